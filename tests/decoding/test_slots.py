"""Sequences in slots, and rounds ahead of the host: each output is what it would be alone."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder, SlotBatch, SlotOptions
from speculative_eft.decoding.running import CapturedBatch, RunningBatch
from speculative_eft.models import CapturedFunctions, EFTModels

from ..exactness.sampling import table_runners
from ..table_models import random_tables
from .test_generate import tiny_trio

LAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 3, "min_p": 0.1},
)


Work: TypeAlias = list[tuple[Tensor, SlotOptions]]


def run_through(
    batch: SlotBatch, work: list[tuple[Tensor, SlotOptions]], whims: random.Random
) -> list[list[int]]:
    """Let all sequences join, whenever a slot is free and chance wills, and collect their tokens."""
    outputs: dict[int, list[int]] = {}
    waiting = list(range(len(work)))
    numbers: dict[int, int] = {}
    ended = 0
    while ended < len(work):
        while waiting and batch.free and (not numbers or whims.random() < 0.7):
            index = waiting.pop(0)
            numbers[batch.join(*work[index])] = index
        for number, progress in batch.step().items():
            outputs.setdefault(numbers[number], []).extend(progress.tokens)
            ended += progress.ended
    return [outputs[index] for index in range(len(work))]


def alone(decoder: EFTDecoder, work: Work, eos: list[int]) -> list[list[int]]:
    """The same continuations from calls of `generate`: a call a law and number of new tokens."""
    outputs: list[list[int]] = [[] for _ in work]
    calls: dict[SlotOptions, list[int]] = {}
    for index, (_, own) in enumerate(work):
        calls.setdefault(dataclasses.replace(own, seed=0), []).append(index)
    for own, chosen in calls.items():
        prompts = [work[index][0] for index in chosen]
        width = max(map(len, prompts))
        ids = torch.stack([torch.cat([prompt.new_zeros(width - len(prompt)), prompt]) for prompt in prompts])
        mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
        law = {name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampled = own.temperature > 0
        output = decoder.generate(
            ids, mask, seed=[work[index][1].seed for index in chosen], do_sample=sampled, eos_token_id=eos,
            max_new_tokens=own.max_new_tokens, **(law if sampled else {}),
        )  # fmt: skip
        assert isinstance(output, Tensor)
        for index, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
            ends = [place + 1 for place, token in enumerate(tokens) if token in eos]
            outputs[index] = tokens[: ends[0]] if ends else tokens
    return outputs


def random_work(count: int, vocab_size: int, whims: random.Random) -> Work:
    return [
        (
            torch.tensor([whims.randrange(vocab_size) for _ in range(whims.randint(1, 9))]),
            SlotOptions(whims.randint(1, 24), whims.randrange(2**62), **whims.choice(LAWS)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("lagging", [False, True])
def test_a_thousand_sequences_in_sixteen_slots(lagging: bool) -> None:
    whims = random.Random(4)
    config = EFTConfig(acceptance="shared_seed", draft_tokens="auto", cost_ratio=0.2)
    work = random_work(1_000, 6, whims)
    tables = random_tables(9, 6)
    wanted = alone(EFTDecoder(table_runners(tables), config), work, [5])
    decoder = EFTDecoder(table_runners(tables), config)
    decoder.lagging = lagging
    batch = SlotBatch(decoder, 16, 40, (5,))
    assert run_through(batch, work, whims) == wanted
    assert batch.free == 16


@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("acceptance", ["shared_seed", "block"])
def test_models_with_caches(acceptance: Any, lagging: bool) -> None:
    """Slots that were used before hold another's keys and values: none of them may leak."""
    whims = random.Random(5)
    config = EFTConfig(acceptance=acceptance, draft_tokens=3)
    models = tiny_trio("llama")
    work = random_work(60, models.vocab_size, whims)
    decoder = EFTDecoder(models, config)
    decoder.lagging = lagging
    wanted = alone(decoder, work, [7])
    assert run_through(SlotBatch(decoder, 5, 40, (7,)), work, whims) == wanted


def test_greedy_sequences_draft_among_sampled_ones_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whims = random.Random(6)
    config = EFTConfig(
        draft_tokens="auto", cost_ratio=0.25, row_cost=0.8, expected_batch=4, draft_weights="own"
    )
    models = tiny_trio("llama")
    work = random_work(40, models.vocab_size, whims)
    decoder = EFTDecoder(models, config)
    wanted = alone(decoder, work, [7])
    drafted = []
    advance = RunningBatch.advance
    monkeypatch.setattr(
        RunningBatch, "advance", lambda self, most, timer: drafted.append(most) or advance(self, most, timer)
    )
    assert run_through(SlotBatch(decoder, 4, 40, (7,)), work, whims) == wanted
    assert set(drafted) == {0, 1}


def test_bad_input_of_slots() -> None:
    batch = SlotBatch(EFTDecoder(table_runners(random_tables(1, 5)), EFTConfig(draft_tokens=2)), 1, 12)
    prompt = torch.tensor([1, 2])
    for bad, options, message in (
        (torch.tensor([], dtype=torch.int64), SlotOptions(3, 0), "at least one token"),
        (torch.tensor([5]), SlotOptions(3, 0), "outside the vocabulary of 5"),
        (prompt, SlotOptions(11, 0), "exceed max_length=12"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.join(bad, options)
    with pytest.raises(ValueError, match="an id of prompt must be an integer"):
        batch.join([1.5], SlotOptions(3, 0))
    nan = float("nan")
    for options in (
        {"temperature": -1.0}, {"temperature": nan}, {"temperature": float("inf")}, {"top_p": 1.5},
        {"top_p": nan}, {"min_p": nan}, {"top_k": 2.5}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5},
        {"max_new_tokens": True}, {"seed": 2**63}, {"seed": 1.5}, {"seed": "1"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            SlotOptions(**{"max_new_tokens": 1, "seed": 0, **options})
    assert batch.free == 1
    batch.join([1, 2], SlotOptions(3, 0))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        batch.join(prompt, SlotOptions(3, 0))


def test_other_calls_between_steps_are_seen() -> None:
    models = tiny_trio("llama")
    decoder, other = EFTDecoder(models, EFTConfig(draft_tokens=2)), EFTDecoder(models)
    apart = EFTDecoder(models.with_own_caches())
    prompt = torch.tensor([5, 6, 7])
    batch = SlotBatch(decoder, 2, 20)
    batch.join(prompt, SlotOptions(8, 0))
    apart.generate(prompt[None], max_new_tokens=3)
    batch.step()
    other.generate(prompt[None], max_new_tokens=3)
    for call in (batch.step, lambda: batch.join(prompt, SlotOptions(8, 0))):
        with pytest.raises(RuntimeError, match="another call has used these models"):
            call()


class Uncaptured(CapturedFunctions):
    """Stands for graphs on a machine without a GPU: runs functions as they are, and counts the keys."""

    def run(self, key: Any, *functions: Any) -> Any:
        self._graphs[key] = None
        draft, verify = functions
        return verify(draft())


@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_calls_as_with_graphs_give_what_they_give_without(draft_tokens: Any) -> None:
    """Rows in powers of two, rounded spans, kept tensors, late reports: the tokens stay the same."""
    models: EFTModels = tiny_trio("llama")
    config = EFTConfig(acceptance="shared_seed", draft_tokens=draft_tokens, cost_ratio=0.2)
    plain, captured = EFTDecoder(models, config), EFTDecoder(models, config)
    graphs = Uncaptured(torch.device("cpu"), 1)
    captured.lagging = True
    captured.captured = CapturedBatch(graphs)
    generator = torch.Generator().manual_seed(0)
    states = set()
    for call in range(4):
        ids = torch.randint(0, models.vocab_size, (5, 6), generator=generator)
        options: dict[str, Any] = {
            "seed": call, "do_sample": call % 2 == 0, "max_new_tokens": 17 + call, "eos_token_id": [3, 4]
        }  # fmt: skip
        wanted = plain.generate(ids, **options)
        assert torch.equal(captured.generate(ids, **options), wanted)
        parts = captured.captured.parts
        assert parts is not None
        states.add(parts[0].output.data_ptr())
        assert {key[0] for key in graphs._graphs} <= {1, 2, 4, 5}
    # Sampled and greedy calls alternate, and each kind begins anew; calls of one kind share their tensors.
    assert len(states) > 1
    before = captured.captured.parts
    captured.generate(ids, **options)
    assert captured.captured.parts is before
