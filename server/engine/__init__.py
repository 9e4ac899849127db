"""The engine's process: token ids in, token ids out; no HTTP and no database.

process.py -> engine.py (one step at a time) -> scheduler.py -> runner.py -> sampler.py -> messages.py

messages.py, config.py     everything that crosses to and from the HTTP process
engine.py                  requests, steps, outputs        sequence.py          one request's state
scheduler.py               chunks of the next step         block_allocator.py   holders of KV blocks
prefix_cache.py            keys of KV blocks               kv_cache/            keys and values, attention over them
loader.py                  artifacts from disk             bank.py              rank rows of hot interventions
edit_plan.py               edited rows of a step           decode_graphs.py     recorded decode steps on CUDA
logits.py, sampler.py      logits to tokens                grammar_masks.py     tokens that a grammar forbids
token_counts.py            a sequence's tokens, for penalties
transfers.py               copies between host and device  engine_errors.py     errors
engine_kernels.py          whether attention and edits run by our kernels
fair_queue.py              which waiting sequence goes next engine_folder.py    the socket, and who ran at a crash
"""
