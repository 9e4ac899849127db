"""The client in two forms. `_async` is the source; `make generate` writes `_sync`, the blocking twin, from it."""
