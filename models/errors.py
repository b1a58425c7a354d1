"""Errors about models, kept apart so that they can be raised before anything heavy is imported."""

from __future__ import annotations


class IncompatibleModelsError(ValueError):
    """Models that cannot be loaded, cannot be run, or do not belong together."""
