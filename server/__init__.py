"""The inference server, in three kinds of processes.

HTTP server       main, app, api, inference, registry, datasets, evaluation: imports neither torch nor transformers
engine            engine/process.py, on base/
training worker   training/worker.py, on base/

Only the engine and the training worker import torch; `reftserve doctor` does for its last check.
"""
