"""Data sets, the trainer and durable training jobs."""
