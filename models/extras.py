"""How to install what is optional."""

from __future__ import annotations

__all__ = ["install_command"]


def install_command(extra: str) -> str:
    """The command that installs one of pyproject.toml's extras; no package index has this package."""
    return f"pip install -c constraints.txt '.[{extra}]' in the checkout of speculative-eft"
