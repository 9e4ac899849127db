"""Errors about the base model on this machine.

BaseModelError
├── UnsupportedModel     the base cannot be computed here; names the unsupported property
└── KernelsUnavailable   the CPU kernels cannot be compiled; names the missing package
"""

from __future__ import annotations


class BaseModelError(Exception):
    """Base class of the errors of `server.base`."""


class UnsupportedModel(BaseModelError):
    """The base cannot be computed here."""


class KernelsUnavailable(BaseModelError):
    """The CPU kernels cannot be compiled on this machine."""
