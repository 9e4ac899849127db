"""The inference server: HTTP, engine, registry and training."""
