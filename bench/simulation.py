"""Speed at true shapes without trained weights: random networks whose acceptance is forced.

Every network runs in full, for what it costs; its logits are then replaced by ones for which each drafted
token is accepted with a given chance, whatever the rule and the temperature. What comes out is no text and
no measurement of acceptance, and everything that reports it says "simulated".
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from speculative_eft.models import (
    EFTModels,
    EFTRunners,
    IncompatibleModelsError,
    Runner,
    StepByStep,
    UnavailableModelsError,
    check_device,
)
from speculative_eft.models.describe import vocabulary_rows
from speculative_eft.models.eft_models import check_model
from speculative_eft.models.errors import first_line
from speculative_eft.models.sources import check_architecture, find_configuration, size_problems

from .published import SHAPES
from .shapes import random_model

__all__ = ["forced_runners", "random_models"]

# Logits far enough apart that the softmax of a row puts next to everything on one token.
_STEP = 30.0
# Sequences and prompts agree at other positions; 997 and the period have no common divisor.
_PERIOD, _STRIDE = 4093, 997


def random_models(large: str, tuned: list[str], base: str, dtype: str, device: str | None) -> EFTModels:
    """Models of random weights: of a name in `SHAPES`, or of the configuration a folder or Hub name has.

    All that configurations tell is checked before any weights are drawn.

    Raises:
        ValueError: if there is no such configuration, or torch cannot use `device`; naming the option if the
            models cannot be run, or not together.
    """
    check_device(device or "cpu")
    asked = [("--large", large), *(("--tuned", name) for name in tuned), ("--base", base)]
    # At once, so that a Hub that does not answer is waited for only once.
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: _find_configuration(*one), asked))
    configurations = [_read_configuration(*one, where) for one, where in zip(asked, found, strict=True)]
    sizes = {}
    for (option, name), config in zip(asked, configurations, strict=True):
        check_architecture(option, config.to_dict())
        model = _build(option, config, dtype, "meta")
        check_model(option, model)
        sizes[f"{option} {name}"] = vocabulary_rows(model)
    for problem in size_problems(sizes):
        raise IncompatibleModelsError(problem)
    torch.manual_seed(0)
    drawn = [
        _build(option, config, dtype, device or "cpu")
        for (option, _), config in zip(asked, configurations, strict=True)
    ]
    return EFTModels(drawn[0], drawn[1:-1], drawn[-1])


def _find_configuration(option: str, name: str) -> Path | None:
    """The config.json of a model; None for one of `SHAPES`."""
    if name in SHAPES:
        return None
    try:
        return find_configuration(option, name)
    except UnavailableModelsError as error:
        raise UnavailableModelsError(f"{error} Nor is it one of {', '.join(SHAPES)}.") from error


def _read_configuration(option: str, name: str, file: Path | None) -> PretrainedConfig:
    try:
        if file is None:
            config = AutoConfig.for_model(**SHAPES[name])
        else:
            config = AutoConfig.from_pretrained(file.parent)
    except (OSError, ValueError) as error:
        raise UnavailableModelsError(
            f"{option}: the configuration of {name} cannot be read ({first_line(error)})."
        ) from error
    config.name_or_path = name
    return config


def _build(option: str, config: PretrainedConfig, dtype: str, device: str) -> PreTrainedModel:
    wanted: Any = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device(device):
            return random_model(config, wanted)
    except ValueError as error:
        raise IncompatibleModelsError(
            f"{option}: no model can be made of {config.name_or_path} ({first_line(error)})."
        ) from error


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
