"""Prompts of a benchmark: read from a file or the bundled held-out set, cut to a length, put in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PromptBatch", "prompt_batches", "read_prompt_file", "with_context"]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are decoded together.

    Attributes:
        input_ids: integers [batch, width], padded on the left.
        attention_mask: [batch, width], 0 where `input_ids` is padding; None where nothing is.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a file: of `.jsonl` the field `prompt` of each line, of any other file each line.

    Empty lines are passed over. In a text file `\\n` stands for a line break inside a prompt.

    Raises:
        ValueError: if the file holds no prompt, or a line of `.jsonl` is not an object with a text `prompt`.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line.replace("\\n", "\n"))
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{path} line {number} must be an object with a text "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def with_context(prompts: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """Each prompt made `context` tokens long: its end, after the prompts that come before it.

    The prompts follow each other in a circle, so that the first has the last before it.
    """
    made = []
    for index, prompt in enumerate(prompts):
        tokens = list(prompt)
        before = index
        while len(tokens) < context:
            before -= 1
            tokens = [*prompts[before % len(prompts)], *tokens]
        made.append(tokens[-context:])
    return made


def prompt_batches(prompts: Sequence[Sequence[int]], batch: int, count: int) -> list[PromptBatch]:
    """`count` batches of `batch` prompts each, which follow each other in a circle, padded on the left."""
    batches = []
    for first in range(0, count * batch, batch):
        rows = [list(prompts[(first + row) % len(prompts)]) for row in range(batch)]
        width = max(map(len, rows))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        batches.append(PromptBatch(padded, None if bool(mask.all()) else mask))
    return batches
