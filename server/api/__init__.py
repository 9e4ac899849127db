"""HTTP routers: each endpoint validates a request, calls a service and shapes the answer.

chat, completions, classify    inference          files, fine_tuning, evals    data sets, jobs, evaluations
models, interventions          the registry       health                       /health, /ready, /metrics
dependencies.py     the services that a router takes            auth.py              the request's owner
error_responses.py  errors -> status codes and OpenAI's shape   body_limit.py        the limit on a body's size
sse.py              server-sent events, lost clients            logprobs.py          log-probabilities on the wire
pages.py            OpenAI's list envelope
metadata_filter.py  `metadata[key]=value` of lists
"""
