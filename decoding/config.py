"""What is sampled from, and how it is drafted: `EFTConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from speculative_eft.kernels import LARGEST_TEMPERATURE, AcceptanceRule

__all__ = ["DraftKind", "DraftWeights", "EFTConfig"]

DraftKind = Literal["auto", "tuned", "pair"]
DraftWeights = Literal["auto", "own", "int8"]


@dataclass(frozen=True)
class EFTConfig:
    """The target law and the way it is drafted.

    Only `alpha`, `beta` and `conservative_top_p` change the law; the others change speed alone.

    Attributes:
        alpha: scale of the fine-tuning delta F - B; one number, or one a tuned model.
        beta: scale of the large model's delta L - B.
        draft_tokens: tokens drafted a round, at least 1, or "auto": each sequence's own choice from its
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
            small pair's law (the EFT paper's filter of up-scaling weights).
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
        for name, value in [("alpha", value) for value in self.alphas] + [("beta", self.beta)]:
            if not _is_number(value) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.draft_tokens != "auto" and (
            not isinstance(self.draft_tokens, int)
            or isinstance(self.draft_tokens, bool)
            or self.draft_tokens < 1
        ):
            raise ValueError(
                f'draft_tokens must be an integer of at least 1 or "auto", got {self.draft_tokens!r}'
            )
        for name, choice, choices in (
            ("acceptance", self.acceptance, get_args(AcceptanceRule)),
            ("draft", self.draft, get_args(DraftKind)),
            ("draft_weights", self.draft_weights, get_args(DraftWeights)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        for name, scale in (("draft_temperature", self.draft_temperature), ("cost_ratio", self.cost_ratio)):
            if scale is not None and not (_is_number(scale) and 0 < scale <= LARGEST_TEMPERATURE):
                raise ValueError(f"{name} must be a finite number above 0 or None, got {scale!r}")
        if not _is_number(self.row_cost) or not 0 <= self.row_cost < math.inf:
            raise ValueError(f"row_cost must be a finite number of at least 0, got {self.row_cost!r}")
        batch = self.expected_batch
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"expected_batch must be an integer of at least 1, got {batch!r}")
        if not isinstance(self.remembered, int) or isinstance(self.remembered, bool) or self.remembered < 0:
            raise ValueError(f"remembered must be an integer of at least 0, got {self.remembered!r}")
        top_p = self.conservative_top_p
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"conservative_top_p must lie in (0, 1] or be None, got {top_p!r}")

    @property
    def alphas(self) -> tuple[float, ...]:
        """Alpha as a tuple: of one number, or of one a tuned model."""
        return tuple(self.alpha) if isinstance(self.alpha, Sequence) else (self.alpha,)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
