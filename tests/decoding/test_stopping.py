"""Stopping never overshoots: output cut where criteria say so, whatever was drafted beyond."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, NaiveEFTDecoder
from speculative_eft.kernels import AcceptanceRule

from ..exactness.sampling import table_runners
from ..table_models import random_tables
from ..tokenizers_of_words import tokenizer_of

TOKENS = ("a", "b", "c", "ab", "ba", "cab", "bb", "ac")
VOCAB, PAD, NEW = len(TOKENS), 7, 16
PROMPTS = torch.tensor([[0, 0, 1, 2], [0, 3, 4, 5], [6, 1, 2, 2]])
MASK = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
RUNNERS = table_runners(random_tables(5, VOCAB))


class SumIs(StoppingCriteria):
    """Ends a sequence when the sum of all its tokens, prompt included, is a multiple of a number."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.sum(dim=1) % self.divisor == 0


def text(tokens: list[int]) -> str:
    return "".join(TOKENS[token] for token in tokens)


def decoders(rule: AcceptanceRule, drafted: int) -> tuple[EFTDecoder, EFTDecoder]:
    return NaiveEFTDecoder(RUNNERS), EFTDecoder(RUNNERS, EFTConfig(acceptance=rule, draft_tokens=drafted))


@pytest.mark.parametrize("case", range(200))
def test_random_stops(case: int) -> None:
    draw = random.Random(case)
    strings = ["".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 2))]
    divisor = draw.choice([7, 11, 23, 10**9])
    ends = draw.sample(range(VOCAB), draw.randint(0, 2))
    options: dict[str, Any] = {"max_new_tokens": NEW, "seed": case, "pad_token_id": PAD, "top_k": 0}
    stops: dict[str, Any] = {
        "stop_strings": strings,
        "stopping_criteria": [SumIs(divisor)],
        "eos_token_id": ends,
        "tokenizer": tokenizer_of(TOKENS),
    }
    # With a processor now and then, which takes the general path.
    if case % 4 == 0:
        options["repetition_penalty"] = 1.2
    options["do_sample"] = case % 3 > 0
    naive, shared = decoders("shared_seed", draw.randint(1, 6))
    plain = naive.generate(PROMPTS, MASK, **options, **stops)
    output = shared.generate(PROMPTS, MASK, **options, **stops)
    assert torch.equal(output, plain)
    free = naive.generate(PROMPTS, MASK, **options)
    assert_cut(plain, free, strings, divisor, ends)
    # The other rules draw other tokens, but theirs are cut at the same places of their own free run.
    own = EFTDecoder(RUNNERS, EFTConfig(acceptance=draw.choice(["block", "token"]), draft_tokens=4))
    assert_cut(
        own.generate(PROMPTS, MASK, **options, **stops),
        own.generate(PROMPTS, MASK, **options),
        strings,
        divisor,
        ends,
    )


def assert_cut(output: Any, free: Any, strings: list[str], divisor: int, ends: list[int]) -> None:
    width = PROMPTS.shape[1]
    lengths = []
    for stopped, row in zip(output.tolist(), free.tolist(), strict=True):
        end = first_end(row, strings, divisor, ends)
        lengths.append(end)
        assert stopped[:end] == row[:end]
        assert set(stopped[end:]) <= {PAD}
    assert output.shape[1] == max(lengths) > width


def first_end(row: list[int], strings: list[str], divisor: int, ends: list[int]) -> int:
    """The length at which a row ends: a string counts when the last token has a part in it."""
    for length in range(PROMPTS.shape[1] + 1, len(row) + 1):
        whole, before = text(row[:length]), len(text(row[: length - 1]))
        by_string = any(
            start + len(string) > before
            for string in strings
            for start in range(len(whole))
            if whole.startswith(string, start)
        )
        if by_string or sum(row[:length]) % divisor == 0 or row[length - 1] in ends:
            return length
    return len(row)


@pytest.mark.parametrize(("lagging", "drafted"), [(False, 5), (True, 2)])
def test_statistics_trace_and_streams_end_with_the_sequence(lagging: bool, drafted: int) -> None:
    pieces: dict[int, list[int]] = {0: [], 1: [], 2: []}
    decoder = EFTDecoder(RUNNERS, EFTConfig(draft_tokens=drafted))
    # On a GPU a round follows before the host has read that a sequence has ended.
    decoder.lagging = lagging
    output = decoder.generate(
        PROMPTS,
        MASK,
        seed=3,
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW,
        stopping_criteria=[SumIs(5)],
        pad_token_id=PAD,
        return_dict_in_generate=True,
        streamer=lambda index, tokens: pieces[index].extend(tokens.tolist()),
    )
    assert isinstance(output, EFTOutput)
    assert output.stats is not None
    assert output.trace is not None
    lengths = [len(source) for source in output.trace.source]
    assert len(set(lengths)) > 1, "rows should end at different times"
    assert output.stats.emitted_tokens == sum(lengths)
    for index, length in enumerate(lengths):
        row = output.sequences[index, 4:].tolist()
        assert pieces[index] == row[:length]
        assert set(row[length:]) <= {PAD}
        trace = output.trace
        for log_probs in (trace.target, trace.large, trace.base, *trace.tuned):
            assert log_probs[index, :length].isfinite().all()
            assert log_probs[index, length:].isnan().all()
    assert output.trace.table()["token"] == [token for row in pieces.values() for token in row]


class WantsScores(StoppingCriteria):
    """Ends a sequence when its last token had a score above a bound."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return scores[-1].log_softmax(-1).gather(1, input_ids[:, -1:])[:, 0] > -0.4


def test_criteria_see_scores_where_they_are_asked_for() -> None:
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "seed": 1, "do_sample": True, "return_dict_in_generate": True,
        "output_scores": True, "stopping_criteria": [WantsScores()], "pad_token_id": PAD,
    }  # fmt: skip
    naive, shared = decoders("shared_seed", 4)
    wanted, output = (one.generate(PROMPTS, MASK, **options) for one in (naive, shared))
    assert isinstance(wanted, EFTOutput)
    assert isinstance(output, EFTOutput)
    assert torch.equal(output.sequences, wanted.sequences)
    assert output.sequences.shape[1] < 4 + NEW
    assert output.scores is not None and wanted.scores is not None
    # Rows that end earlier than others have zeros there, whatever was drafted beyond.
    assert any((row == 0).all() for row in output.scores[-1])
    for own, others in zip(output.scores, wanted.scores, strict=True):
        torch.testing.assert_close(own, others)


def test_criteria_see_padding_behind_sequences_that_have_ended() -> None:
    seen: list[Tensor] = []

    def end_first_row_at_two(ids: Any, scores: Any, **kwargs: Any) -> Any:
        seen.append(ids[0, 6:].clone())
        return torch.tensor([ids.shape[1] == 6, False, False])

    _, decoder = decoders("block", 5)
    decoder.generate(
        PROMPTS, MASK, max_new_tokens=NEW, pad_token_id=PAD, stopping_criteria=[end_first_row_at_two]
    )
    assert max(map(len, seen)) == NEW - 2
    assert all((tokens == PAD).all() for tokens in seen)


def test_time_ends_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later, so that the third token is the last."""
    now = iter(range(1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    for decoder in decoders("token", 4):
        output = decoder.generate(PROMPTS[:1], MASK[:1], max_new_tokens=NEW, max_time=2.5)
        assert isinstance(output, Tensor)
        assert output.shape[1] == 4 + 3
