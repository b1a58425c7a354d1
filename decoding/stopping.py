"""Stopping by what only the host can decide, one committed token at a time: strings, time, own criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from speculative_eft.kernels import RoundState

from .options import GenerationOptions
from .round import TraceBuffers

__all__ = ["StopWatch", "build_criteria", "cut"]


def build_criteria(
    options: GenerationOptions, custom: Sequence[StoppingCriteria], tokenizer: Any
) -> StoppingCriteriaList:
    """What may end a sequence beside its end-of-sequence tokens and its length; time runs from here.

    Raises:
        ValueError: for stop strings without a tokenizer, and for a criterion that cannot be called.
    """
    criteria = StoppingCriteriaList()
    if options.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=options.max_time))
    if options.stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer: give tokenizer=, or models that have one")
        if not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        criteria.append(StopStringCriteria(tokenizer, list(options.stop_strings)))
    criteria.extend(custom)
    return criteria


class StopWatch:
    """Asks the criteria about every token when it is committed, and cuts a round's tokens where they say so.

    A criterion sees `input_ids` of the whole batch up to the length it is asked about, as in plain decoding;
    what it says of a sequence that is not at that length is not read.

    Attributes:
        stopped: for each sequence that a criterion ended, its number of generated tokens.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, prompts: Tensor, max_new_tokens: int, pad_token_id: int
    ) -> None:
        """`prompts` are int64 [batch, width], padding included."""
        batch, self._width = prompts.shape
        self._criteria = criteria
        self._pad = pad_token_id
        room = prompts.new_full((batch, max_new_tokens), pad_token_id)
        self._tokens = torch.cat([prompts, room], dim=1)
        self._generated = [0] * batch
        self.stopped: dict[int, int] = {}

    def see(self, report: list[list[int]], scores: Sequence[Tensor] | None = None) -> list[int]:
        """Judge the tokens of one round's report, in which counts are cut and ended sequences marked.

        Args:
            report: for each sequence the count of tokens committed, the next draft length and the tokens.
            scores: [batch, vocab] for each generated position, if criteria are to see them.

        Returns:
            The sequences that a criterion ended now.
        """
        starts = list(self._generated)
        for index, row in enumerate(report):
            if index in self.stopped:
                row[:2] = [0, -1]
            count = row[0]
            self._generated[index] += count
            first = self._width + starts[index]
            self._tokens[index, first : first + count] = self._tokens.new_tensor(row[2 : 2 + count])
        ended = []
        for generated in sorted(
            {n + 1 for start, end in zip(starts, self._generated, strict=True) for n in range(start, end)}
        ):
            given = None if scores is None else tuple(scores[:generated])
            verdict: Any = self._criteria(self._tokens[:, : self._width + generated], given)
            verdicts = verdict.flatten().tolist()
            for index, start in enumerate(starts):
                reached = start < generated <= self._generated[index]
                if reached and verdicts[index]:
                    self._end(index, generated, report[index], start)
                    ended.append(index)
        return ended

    def _end(self, index: int, generated: int, row: list[int], start: int) -> None:
        self.stopped[index] = self._generated[index] = generated
        row[:2] = [generated - start, -1]
        self._tokens[index, self._width + generated :] = self._pad


def cut(state: RoundState, trace: TraceBuffers | None, stopped: Mapping[int, int], pad_token_id: int) -> None:
    """Take back what was committed beyond the ends that a `StopWatch` found."""
    if not stopped:
        return
    rows = torch.tensor(list(stopped), device=state.output.device)
    state.generated[rows] = torch.tensor(list(stopped.values()), device=state.output.device)
    beyond = torch.arange(state.output.shape[1], device=state.output.device) >= state.generated[:, None]
    state.output.masked_fill_(beyond, pad_token_id)
    if trace is not None:
        trace.source.masked_fill_(beyond, -1)
        for log_probs in (trace.large, trace.base, trace.target, *trace.tuned):
            log_probs.masked_fill_(beyond, torch.nan)
