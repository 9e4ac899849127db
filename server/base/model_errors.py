"""Errors about the base model on this machine; each message names the unsupported property or the missing package."""

from __future__ import annotations


class BaseModelError(Exception):
    """Base class of the errors of `server.base`."""


class UnsupportedModel(BaseModelError):
    """The base cannot be computed here."""


class KernelsUnavailable(BaseModelError):
    """The CPU kernels cannot be compiled on this machine."""
