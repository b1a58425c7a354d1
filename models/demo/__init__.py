"""The bundled demo trio: three small language models of Python source, and prompts they have not seen.

The weights are in `weights/`, one folder a role that transformers loads on its own; MODEL_CARD.md says how
they were made, and `python -P -m speculative_eft.models.demo.train` makes them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

__all__ = ["DemoRole", "held_out_prompts", "weights_folder"]

DemoRole = Literal["large_base", "small_tuned", "small_base"]

_HERE = Path(__file__).resolve().parent


def weights_folder(role: DemoRole) -> Path:
    """The folder with the weights, configuration and tokenizer of one model of the trio.

    Raises ValueError for another role, and FileNotFoundError when the weights are not installed.
    """
    if role not in get_args(DemoRole):
        raise ValueError(f"role must be one of {', '.join(get_args(DemoRole))}, not {role!r}")
    folder = _HERE / "weights" / role
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the demo weights are not installed: {folder} has no config.json; "
            "`python -P -m speculative_eft.models.demo.train` makes them"
        )
    return folder


def held_out_prompts() -> list[str]:
    """Task prompts from files that no model of the trio was trained on, each ending in a line break."""
    with (_HERE / "prompts.jsonl").open(encoding="utf-8") as lines:
        return [str(json.loads(line)["prompt"]) for line in lines]
