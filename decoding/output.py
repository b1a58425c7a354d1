"""What `generate` returns beside the tokens: statistics and the per-token trace."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speculative_eft.kernels import RoundState

from .draft_length import DraftLengthPolicy
from .past import CACHE_NAMES, EFTPast
from .round import SOURCES, TraceBuffers
from .scoring import TokenScores

__all__ = [
    "CACHE_FIELD", "EFTOutput", "EFTStats", "EFTTrace", "a_token_each", "ordinary", "table_of", "totals",
]  # fmt: skip

Output = TypeVar("Output")

CACHE_FIELD = next(field.name for field in fields(GenerateDecoderOnlyOutput) if field.name in CACHE_NAMES)
"""Where transformers' output has a past; `past_key_values` finds it by either name."""


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
        seconds: wall-clock seconds by phase: prefill, draft, large, base, verify, other. On a GPU the host
            does not wait for what it launches, so only their sum means anything.
        cost_ratio, row_cost: by which draft lengths were chosen; None where they were fixed.
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
    cost_ratio: float | None = None
    row_cost: float | None = None

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
        tokens: int64 [batch, new tokens].
    """

    source_ids: Tensor
    large: Tensor
    tuned: list[Tensor]
    base: Tensor
    target: Tensor
    tokens: Tensor

    @property
    def source(self) -> list[list[str]]:
        """Each sequence's sources by name, without padding."""
        return [[SOURCES[index] for index in row if index >= 0] for row in self.source_ids.tolist()]

    def table(self, tokenizer: Any = None) -> dict[str, list[Any]]:
        """A row for each generated token, as columns that `pandas.DataFrame` takes.

        Args:
            tokenizer: adds the column `text`, each token decoded by itself.

        Returns:
            `sequence` and `position` (counted from 0 after the prompt), `token`, `text`, `source`, `accepted`
            (whether it was drafted), log-probabilities in nats under each model and the target (`large`,
            `tuned` or `tuned_0`, `tuned_1`..., `base`, `target`), and `log_ratio`, that of the large base
            over the small one, which drafts lack.
        """
        is_token = self.source_ids >= 0
        sequence, position = is_token.nonzero(as_tuple=True)
        tokens = self.tokens[is_token].tolist()
        source = [SOURCES[index] for index in self.source_ids[is_token].tolist()]
        names = ["tuned"] if len(self.tuned) == 1 else [f"tuned_{index}" for index in range(len(self.tuned))]
        large, base = self.large[is_token], self.base[is_token]
        return {
            "sequence": sequence.tolist(),
            "position": position.tolist(),
            "token": tokens,
            **({} if tokenizer is None else {"text": [tokenizer.decode([token]) for token in tokens]}),
            "source": source,
            "accepted": [name == "draft" for name in source],
            "large": large.tolist(),
            **{name: values[is_token].tolist() for name, values in zip(names, self.tuned, strict=True)},
            "base": base.tolist(),
            "target": self.target[is_token].tolist(),
            "log_ratio": (large - base).tolist(),
        }


@dataclass
class EFTOutput(GenerateDecoderOnlyOutput):
    """transformers' output of decoder-only generation, with `stats` and `trace`.

    Attributes:
        sequences: int64 [batch, prompt width + new tokens].
        scores, logits: where asked for, a float32 [batch, vocabulary of the large base] for each new token:
            of the target, after and before the processors; zeros where a sequence has ended.
        past_key_values: lets the next call prefill only what is new; no keys and values themselves.
        stats: totals of the call.
        trace: per-token sources and log-probabilities.
    """

    stats: EFTStats | None = None
    trace: EFTTrace | None = None
    if TYPE_CHECKING:
        # transformers' own is a Cache, which the next call does not take.
        past_key_values: EFTPast | None = None  # type: ignore[assignment]


def ordinary(output: Output) -> Output:
    """The output with tensors that may be written to and trained on, as transformers returns them.

    What is made in inference mode may not.
    """
    part: Any = output
    if isinstance(part, Tensor):
        part = part.clone()
    elif isinstance(part, list | tuple):
        part = type(part)(map(ordinary, part))
    elif isinstance(part, EFTOutput | EFTTrace | TokenScores):
        copies = {field.name: ordinary(getattr(part, field.name)) for field in fields(part)}
        part = replace(part, **copies)
    return cast(Output, part)


def totals(
    state: RoundState, rounds: int, seconds: dict[str, float], policy: DraftLengthPolicy | None
) -> EFTStats:
    """What a batch that has ended comes to."""
    tested = int(state.tested.sum())
    pairs = zip(state.accepted_at.tolist(), state.tested_at.tolist(), strict=True)
    return EFTStats(
        rounds=rounds,
        sequence_rounds=int(state.rounds.sum()),
        drafted_tokens=int(state.drafted.sum()),
        tested_tokens=tested,
        accepted_tokens=int(state.accepted.sum()),
        emitted_tokens=int(state.generated.sum()),
        accepted_by_position=tuple(accepted / count for accepted, count in pairs if count),
        expected_acceptance=float(state.expected.sum() / tested) if tested else 0.0,
        seconds=seconds,
        cost_ratio=None if policy is None else policy.cost_ratio,
        row_cost=None if policy is None else policy.row_cost,
    )


def table_of(trace: TraceBuffers, tokens: Tensor) -> EFTTrace:
    """The trace of the generated `tokens`, int64 [batch, new tokens]."""
    new = tokens.shape[1]
    return EFTTrace(
        source_ids=trace.source[:, :new].clone(),
        large=trace.large[:, :new].clone(),
        tuned=[tuned[:, :new].clone() for tuned in trace.tuned],
        base=trace.base[:, :new].clone(),
        target=trace.target[:, :new].clone(),
        tokens=tokens,
    )


def a_token_each(buffer: Tensor | None, generated: Tensor, width: int) -> Any:
    """One [batch, width] for each generated position, as transformers has it; zeros where a row has ended.

    Args:
        buffer: float32 [batch, new tokens, vocab], overwritten; None gives None.
        generated: int64 [batch], tokens of each sequence.
    """
    if buffer is None:
        return None
    beyond = torch.arange(buffer.shape[1], device=buffer.device) >= generated[:, None]
    rows = buffer.masked_fill_(beyond[..., None], 0.0)[:, : int(generated.max())]
    padding = (0, width - buffer.shape[2])
    rows = torch.nn.functional.pad(rows, padding, value=-torch.inf)
    return rows.unbind(1)
