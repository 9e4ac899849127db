"""Computes the frozen base model. The engine and training use it; it imports neither."""
