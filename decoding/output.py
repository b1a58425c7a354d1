"""What `generate` returns beside the tokens: statistics and the per-token trace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

__all__ = ["EFTOutput", "EFTStats", "EFTTrace"]

_SOURCES = ("draft", "residual", "bonus")


@dataclass(frozen=True)
class EFTStats:
    """Totals over the batch of one call of `generate`.

    Attributes:
        rounds: rounds the batch ran; the large model is called once in each.
        sequence_rounds: rounds summed over sequences, each until its end.
        drafted_tokens: tokens submitted to verification.
        tested_tokens: drafted tokens up to and including the first one not accepted in each round.
        accepted_tokens: drafted tokens accepted.
        emitted_tokens: tokens in the output, end-of-sequence tokens included.
        accepted_by_position: at each position of the draft, the share of tested tokens accepted.
        expected_acceptance: mean of sum min(p, q) over tested tokens, which the token rule's
            `acceptance_rate` estimates and the block rule's exceeds; 0 where nothing was drafted.
        seconds: wall-clock seconds by phase: prefill, draft, large, base, verify, other.
    """

    rounds: int
    sequence_rounds: int
    drafted_tokens: int
    tested_tokens: int
    accepted_tokens: int
    emitted_tokens: int
    accepted_by_position: tuple[float, ...]
    expected_acceptance: float
    seconds: dict[str, float]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over tested tokens; 0 where nothing was drafted."""
        return self.accepted_tokens / self.tested_tokens if self.tested_tokens else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens a sequence gains a round."""
        return self.emitted_tokens / self.sequence_rounds if self.sequence_rounds else 0.0

    @property
    def large_calls_per_token(self) -> float:
        """Rounds a sequence needs for one token: 1 for plain decoding."""
        return self.sequence_rounds / self.emitted_tokens if self.emitted_tokens else 0.0


@dataclass(frozen=True)
class EFTTrace:
    """Where each generated token came from and how probable it was; right-padded.

    Attributes:
        source_ids: int64 [batch, new tokens]: 0 draft, 1 residual, 2 bonus, -1 padding.
        large, base, target: float32 [batch, new tokens], log-probability of the token under the large
            base, the small base, and the target it was drawn from (after temperature and filters; before
            them for greedy decoding); NaN for padding.
        tuned: one such tensor a tuned model.
    """

    source_ids: Tensor
    large: Tensor
    tuned: list[Tensor]
    base: Tensor
    target: Tensor

    @property
    def source(self) -> list[list[str]]:
        """Each sequence's sources by name, without padding."""
        return [[_SOURCES[index] for index in row if index >= 0] for row in self.source_ids.tolist()]


@dataclass
class EFTOutput(GenerateDecoderOnlyOutput):
    """transformers' output of decoder-only generation, with `stats` and `trace`.

    Attributes:
        sequences: int64 [batch, prompt width + new tokens].
        stats: totals of the call.
        trace: per-token sources and log-probabilities.
    """

    stats: EFTStats | None = None
    trace: EFTTrace | None = None
