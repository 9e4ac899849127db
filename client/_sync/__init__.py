# Generated from client/_async/__init__.py by `make generate`. Change that file instead.
"""The client in two forms. `_async` is the source; `make generate` writes `_sync`, the blocking twin, from it."""
