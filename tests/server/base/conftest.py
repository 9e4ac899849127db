"""Fixtures for tests that compute with the base."""

from __future__ import annotations

from kernel_fixtures import kernels, one_thread

__all__ = ["kernels", "one_thread"]
