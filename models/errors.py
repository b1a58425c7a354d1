"""Errors about models, and what errors say, kept apart so that nothing heavy need be imported for them."""

from __future__ import annotations


class IncompatibleModelsError(ValueError):
    """Models that cannot be loaded, cannot be run, or do not belong together."""


class UnavailableModelsError(IncompatibleModelsError):
    """Models that cannot be looked at: a folder that holds none, a name without an answer from the Hub."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
