"""Routers: validate a request, call a service, shape the answer.

chat, completions, classify    inference          files, fine_tuning, evals    data sets, jobs, evaluations
models, interventions          the registry       health                       /health, /ready, /metrics
dependencies.py     the services that a router may ask for      auth.py              who is asking
error_responses.py  errors -> status codes and OpenAI's shape   body_limit.py        how large a body may be
sse.py              server-sent events, clients that leave      logprobs.py          log-probabilities on the wire
"""
