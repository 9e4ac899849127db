"""The one door to the engine: every request for tokens or scores goes through `InferenceService`.

service.py             prepare a request, stream its answers, score texts
generation.py          the values: a prepared request, a piece of an answer, token counts
admission.py           refuses requests that would wait too long
answer_queue.py        answers of one request side by side, their pieces in one stream
engine.py              the engine's contract;            engine_client.py: our engine, in its own process
sampling.py            request fields -> sampling parameters;  structured_outputs.py: request fields -> grammar
detokenizer.py         tokens -> text, piece by piece;  stop_strings.py: where a stop string ends
labels.py              label sets and their probabilities;  metrics.py: Prometheus metrics
"""
