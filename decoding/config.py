"""What is sampled from, and how it is drafted: `EFTConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from speculative_eft.kernels import AcceptanceRule

from .checks import between, integer

__all__ = ["DraftKind", "DraftWeights", "EFTConfig"]

DraftKind = Literal["auto", "tuned", "pair"]
DraftWeights = Literal["auto", "own", "int8"]

_MOST_DRAFT_TOKENS = 4096
"""Caches have room for a draft, and rounds for its logits: more is a mistake, not a wish."""
_LARGEST_WEIGHT = 1e30
"""Of alpha and beta either way: logits of up to 1e8 that are mixed with it stay finite in float32."""


@dataclass(frozen=True)
class EFTConfig:
    """The target law and the way it is drafted.

    Only `alpha`, `beta` and `conservative_top_p` change the law; the others change speed alone.

    Attributes:
        alpha: scale of the fine-tuning delta F - B; one number, or one a tuned model, of at most 1e30 either
            way.
        beta: scale of the large model's delta L - B, in the same bounds.
        draft_tokens: tokens drafted a round, 1 to 4096, or "auto": each sequence's own choice from its
            running acceptance and `cost_ratio`, so that a seed reproduces its output.
        acceptance: "block" (most tokens a round), "token" (the classic rule) or "shared_seed" (the
            output is token for token that of `NaiveEFTDecoder` with the same seed).
        draft: "tuned" (the tuned models draft alone), "pair" (with the small base) or "auto": "tuned"
            where the alphas sum to 1, since the base then cancels in the draft law.
        draft_weights: "own", or "int8" for drafts by copies of the models' weights in eight bits, half of 16
            bits to read a step; the models themselves score what is drafted. For Llama-like models without
            adapters, and one sequence at a time: with more it is exact, but no faster, and on a GPU slower.
            "auto" is "int8" where rounds of such models are compiled for a CPU and `expected_batch` is 1.
            Rounds with logits processors draft by the models' own.
        draft_temperature: temperature of the draft law; None for the target's.
        conservative_top_p: where set, the large model's delta applies only inside the top-p set of the
            small pair's law (the EFT paper's filter of up-scaling weights); 1 is no filter.
        cost_ratio, row_cost: one step of the models that draft, and what one more drafted token of every
            sequence adds beyond it to a round, over one step of the large model: `draft_tokens="auto"`
            chooses by them. Where `cost_ratio` is None both are measured, once for the models on a machine,
            rounded, and kept in the user's cache. To reproduce sampled outputs on another machine, set them
            to what `EFTStats` reports.
        expected_batch: sequences that will run together, at which they are measured. Where it is 1 and rounds
            are compiled for a CPU, drafts of "auto" also end by what was drawn; a GPU does not repeat that.
            Where it is more, drafts of "auto" differ less between sequences and have to promise more, since
            a batch ends with its slowest sequence.
        remembered: log-ratios log L - log B that each sequence keeps to correct its drafts by, float32
            [vocabulary] each; 0 for none.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    alpha: float | Sequence[float] = 1.0
    beta: float = 1.0
    draft_tokens: int | Literal["auto"] = "auto"
    acceptance: AcceptanceRule = "block"
    draft: DraftKind = "auto"
    draft_weights: DraftWeights = "auto"
    draft_temperature: float | None = None
    conservative_top_p: float | None = None
    cost_ratio: float | None = None
    row_cost: float = 0.0
    expected_batch: int = 1
    remembered: int = 64

    def __post_init__(self) -> None:
        # Numbers of numpy and torch become Python's: a configuration is compared, and saved as JSON.
        alphas = tuple(between("alpha", alpha, -_LARGEST_WEIGHT, _LARGEST_WEIGHT) for alpha in self.alphas)
        numbers: dict[str, Any] = {
            "alpha": alphas if isinstance(self.alpha, Sequence) else alphas[0],
            "beta": between("beta", self.beta, -_LARGEST_WEIGHT, _LARGEST_WEIGHT),
            "row_cost": between("row_cost", self.row_cost, 0, math.inf),
            "expected_batch": integer("expected_batch", self.expected_batch, 1),
            "remembered": integer("remembered", self.remembered),
        }
        for name, choice, choices in (
            ("acceptance", self.acceptance, get_args(AcceptanceRule)),
            ("draft", self.draft, get_args(DraftKind)),
            ("draft_weights", self.draft_weights, get_args(DraftWeights)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        for name, value, high in (
            ("draft_temperature", self.draft_temperature, math.inf),
            ("conservative_top_p", self.conservative_top_p, 1),
            ("cost_ratio", self.cost_ratio, math.inf),
        ):
            if value is not None:
                numbers[name] = between(name, value, math.ulp(0.0), high, "None")
        if self.draft_tokens != "auto":
            numbers["draft_tokens"] = drafted = integer("draft_tokens", self.draft_tokens, 1, '"auto"')
            if drafted > _MOST_DRAFT_TOKENS:
                raise ValueError(f"draft_tokens must be at most {_MOST_DRAFT_TOKENS}, got {drafted}")
        if numbers["row_cost"] and self.cost_ratio is None:
            raise ValueError("row_cost needs cost_ratio: where that is None both are measured")
        for name, number in numbers.items():
            object.__setattr__(self, name, number)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Alpha as a tuple: of one number, or of one a tuned model."""
        return tuple(self.alpha) if isinstance(self.alpha, Sequence) else (self.alpha,)
