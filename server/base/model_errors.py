"""Errors about the base model on this machine.

BaseModelError
├── UnsupportedModel     the base cannot be computed here; says which property is in the way
└── KernelsUnavailable   the CPU kernels cannot be compiled; says what to install
"""

from __future__ import annotations


class BaseModelError(Exception):
    """Anything that `server.base` raises on purpose."""


class UnsupportedModel(BaseModelError):
    """The base cannot be computed here."""


class KernelsUnavailable(BaseModelError):
    """The CPU kernels cannot be compiled on this machine."""
