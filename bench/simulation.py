"""Speed at true shapes without trained weights: random networks whose acceptance is forced.

Every network runs in full, for what it costs; its logits are then replaced by ones for which each drafted
token is accepted with a given chance, whatever the rule and the temperature. What comes out is no text and
no measurement of acceptance, and everything that reports it says "simulated".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from speculative_eft.models import EFTModels, EFTRunners, Runner, StepByStep, check_device

from .published import SHAPES
from .shapes import random_model

__all__ = ["forced_runners", "random_models"]

# Logits far enough apart that the softmax of a row puts next to everything on one token.
_STEP = 30.0
# Sequences and prompts agree at other positions; 997 and the period have no common divisor.
_PERIOD, _STRIDE = 4093, 997


def random_models(large: str, tuned: list[str], base: str, dtype: str, device: str | None) -> EFTModels:
    """Models of random weights: of a name in `SHAPES`, or of the configuration a folder or Hub name has.

    Raises:
        ValueError: if there is no such configuration, or torch cannot use `device`.
    """
    check_device(device or "cpu")
    torch.manual_seed(0)

    def build(name: str) -> PreTrainedModel:
        config: Any
        if name in SHAPES:
            config = AutoConfig.for_model(**SHAPES[name])
        else:
            try:
                config = AutoConfig.from_pretrained(os.path.expanduser(name))
            except OSError as error:
                known = ", ".join(SHAPES)
                raise ValueError(f"{name!r} has no configuration, and is not one of {known}") from error
        config.name_or_path = name
        wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        with torch.device(device or "cpu"):
            return random_model(config, wanted)

    return EFTModels(build(large), [build(name) for name in tuned], build(base))


def forced_runners(runners: EFTRunners, acceptance: float, drafters: Sequence[Runner] = ()) -> EFTRunners:
    """The same networks with logits for which a drafted token is accepted with chance `acceptance`.

    The small models always expect one token. So does the large model at a share `acceptance` of the
    positions, drawn once; at the others it expects another token, against any draft. `drafters` are what
    drafts in the tuned models' place, as in `EFTRunners`.
    """
    generator = torch.Generator().manual_seed(0)
    agrees = torch.rand(_PERIOD, generator=generator) < acceptance
    small = torch.tensor([[_STEP, 0.0]])
    # L + F - B is L where F and B are the same, and so is L + B - B where the small base drafts.
    large = torch.where(agrees[:, None], torch.tensor([[_STEP, 0.0]]), torch.tensor([[0.0, _STEP]]))
    return EFTRunners(
        large=_ForcedRunner(runners.large, large),
        tuned=[_ForcedRunner(runner, small) for runner in runners.tuned],
        base=_ForcedRunner(runners.base, small),
        drafters=[_ForcedRunner(runner, small) for runner in drafters],
    )


class _ForcedRunner(StepByStep):
    """A `Runner` that runs another one and returns logits from a table by position.

    Every pass goes through `forward`, where the logits are replaced.

    Args:
        runner: what runs.
        peaks: float32 [period or 1, 2], logits of the drafted token and of its replacement.
    """

    def __init__(self, runner: Runner, peaks: Tensor) -> None:
        self._runner = runner
        self._peaks = peaks.to(runner.device)
        self.vocab_size = runner.vocab_size
        self.max_context = runner.max_context
        self.device = runner.device
        # Those of a small model make no difference; one that drafts for another sees no prompts.
        self._offsets = torch.zeros(1, 1, dtype=torch.int64, device=runner.device)

    @property
    def lengths(self) -> Tensor:
        return self._runner.lengths

    @property
    def addresses(self) -> list[float]:
        return self._runner.addresses

    @property
    def reservations(self) -> int:
        return self._runner.reservations

    def reserve(self, batch: int, length: int, keep: bool = False) -> None:
        self._runner.reserve(batch, length, keep)

    def use(self, batch: int) -> None:
        self._runner.use(batch)

    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        self._runner.rearrange(slots, sources, span)
        self._offsets[list(slots)] = self._offsets[list(sources)]

    def fill_slot(self, slot: int, tokens: Tensor) -> None:
        self._runner.fill_slot(slot, tokens)

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        self._runner.forward(tokens, span)
        batch, rows = tokens.shape
        # New memory a call: a draft keeps the rows of every step.
        logits = torch.zeros(batch, rows, self.vocab_size, device=self.device)
        columns = torch.arange(rows, device=self.device) + self.lengths[:, None] + self._offsets[:batch]
        logits[..., :2] = self._peaks[columns % self._peaks.shape[0]]
        return logits

    def prefill(
        self, tokens: Tensor, prompt_lengths: Tensor, chunk: int = 512, begins: Tensor | None = None
    ) -> None:
        self._runner.prefill(tokens, prompt_lengths, chunk, begins)
        batch, width = tokens.shape
        self._offsets = _STRIDE * torch.arange(batch, device=self.device)[:, None]
        if width:
            self._offsets = self._offsets + _STRIDE * tokens[:, :1]
