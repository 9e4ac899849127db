"""HTTP routers: each endpoint validates a request, calls a service and shapes the answer.

chat, completions, classify    inference          files, fine_tuning, evals    data sets, jobs, evaluations
models, interventions          the registry       health                       /health, /ready, /metrics
dependencies.py     the services that a router takes            auth.py              the request's owner
error_responses.py  errors -> status codes and OpenAI's shape   body_limit.py        the limit on a body's size
sse.py              server-sent events, lost clients            logprobs.py          log-probabilities on the wire
envelope.py         OpenAI's list envelope                      own_threads.py       threads for calls that block
metadata_filter.py  `metadata[key]=value` of lists
body_route.py       reads and validates JSON bodies             json_body.py         bytes -> a bounded JSON value
forms.py            each multipart field once                   openapi.py           errors and streams in /openapi.json
index.py            / and /v1                                   connection.py        slow headers, HTTP/1.0
host_check.py, origin_check.py, request_line.py, content_encoding.py    middlewares, with body_limit.py
"""
