"""Errors about models, kept apart so that they can be raised before anything heavy is imported."""

from __future__ import annotations


class IncompatibleModelsError(ValueError):
    """Models that cannot be loaded, cannot be run, or do not belong together."""


class UnavailableModelsError(IncompatibleModelsError):
    """Models that cannot be looked at: a folder that holds none, a name without an answer from the Hub."""
