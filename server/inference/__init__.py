"""One door to the engine: prepare a request, stream its answers, score texts."""
