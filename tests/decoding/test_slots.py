"""Sequences in slots, and rounds ahead of the host: each output is what it would be alone."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, SlotBatch, SlotOptions, SlotProgress
from speculative_eft.decoding.running import RunningBatch
from speculative_eft.models import EFTModels

from ..exactness.sampling import table_runners
from ..table_models import random_tables
from ..tiny_models import tiny_trio
from ..uncaptured import as_with_graphs

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


def random_work(count: int, vocab_size: int, whims: random.Random, longest_prompt: int = 9) -> Work:
    return [
        (
            torch.tensor([whims.randrange(vocab_size) for _ in range(whims.randint(1, longest_prompt))]),
            SlotOptions(whims.randint(1, 24), whims.randrange(2**62), **whims.choice(LAWS)),
        )
        for _ in range(count)
    ]


def run_as(decoder: EFTDecoder, how: str) -> None:
    """Have `decoder` run plainly, one round ahead of the host, or so in rounds that graphs could replay."""
    decoder.lagging = how != "plainly"
    if how == "as with graphs":
        as_with_graphs(decoder)


HOW = pytest.mark.parametrize("how", ["plainly", "one ahead", "as with graphs"])


@HOW
def test_a_thousand_sequences_in_sixteen_slots(how: str) -> None:
    whims = random.Random(4)
    config = EFTConfig(acceptance="shared_seed", draft_tokens="auto", cost_ratio=0.2)
    work = random_work(1_000, 6, whims)
    tables = random_tables(9, 6)
    wanted = alone(EFTDecoder(table_runners(tables), config), work, [5])
    decoder = EFTDecoder(table_runners(tables), config)
    run_as(decoder, how)
    batch = SlotBatch(decoder, 16, 40, (5,))
    assert run_through(batch, work, whims) == wanted
    assert batch.free == 16


@HOW
@pytest.mark.parametrize(("acceptance", "longest_prompt"), [("shared_seed", 9), ("block", 90)])
def test_models_with_caches(acceptance: Any, longest_prompt: int, how: str) -> None:
    """Slots that were used before hold another's keys and values: none of them may leak."""
    whims = random.Random(5)
    config = EFTConfig(acceptance=acceptance, draft_tokens=3, draft_temperature=1.5)
    models = tiny_trio("llama", context=256)
    work = random_work(60, models.vocab_size, whims, longest_prompt)
    decoder = EFTDecoder(models, config)
    run_as(decoder, how)
    wanted = alone(decoder, work, [7])
    assert run_through(SlotBatch(decoder, 5, longest_prompt + 31, (7,)), work, whims) == wanted


def test_greedy_sequences_draft_among_sampled_ones_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whims = random.Random(6)
    config = EFTConfig(
        draft_tokens="auto", cost_ratio=0.25, row_cost=0.9, expected_batch=4, draft_weights="own"
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
    # From its first round on.
    batch = SlotBatch(decoder, 4, 40)
    for temperature in (1.0, 0.0):
        batch.join([5, 6], SlotOptions(8, 0, temperature))
    drafted.clear()
    batch.step()
    assert drafted == [1]


def test_a_greedy_sequence_drafts_beside_a_sampled_one_as_alone() -> None:
    # At these costs a draft pays where it is accepted as often as a greedy one, and else does not.
    config = EFTConfig(
        draft_tokens="auto", cost_ratio=0.25, row_cost=0.9, expected_batch=4, draft_weights="own"
    )
    decoder = EFTDecoder(tiny_trio("llama"), config)
    runs = []
    for beside in (False, True):
        batch = SlotBatch(decoder, 2, 60)
        number = batch.join([5, 6], SlotOptions(30, 0, temperature=0.0))
        if beside:
            batch.join([7, 8], SlotOptions(50, 1))
        steps = [batch.step()[number]]
        while not steps[-1].ended:
            steps.append(batch.step()[number])
        runs.append([step.tokens for step in steps])
    assert runs[0] == runs[1]
    assert max(map(len, runs[0])) > 1


def test_drafts_of_few_tokens_are_as_short_in_slots_as_alone() -> None:
    """By the block rule what is drafted beyond the limit would change what is drawn before it."""
    decoder = EFTDecoder(table_runners(random_tables(9, 6)), EFTConfig(draft_tokens=5))
    work = [(torch.tensor([1, 2]), SlotOptions(2, seed)) for seed in range(100)]
    wanted = alone(decoder, work, [])
    assert run_through(SlotBatch(decoder, 16, 40), work, random.Random(7)) == wanted


def test_bad_input_of_slots() -> None:
    batch = SlotBatch(EFTDecoder(table_runners(random_tables(1, 5)), EFTConfig(draft_tokens=2)), 1, 12)
    prompt = torch.tensor([1, 2])
    for bad, options, message in (
        (torch.tensor([], dtype=torch.int64), SlotOptions(3, 0), "at least one token"),
        (5, SlotOptions(3, 0), "integers of shape"),
        (None, SlotOptions(3, 0), "integers of shape"),
        ([], SlotOptions(3, 0), "at least one token"),
        (torch.tensor([5]), SlotOptions(3, 0), "outside the vocabulary of 5"),
        ([1, 2**63], SlotOptions(3, 0), "outside the vocabulary of 5"),
        (prompt, SlotOptions(11, 0), "exceed max_length=12"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.join(bad, options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an id of prompt must be an integer"):
        batch.join([1.5], SlotOptions(3, 0))
    nan = float("nan")
    for options in (
        {"temperature": -1.0}, {"temperature": nan}, {"temperature": float("inf")}, {"temperature": 10**400},
        {"top_p": 1.5}, {"top_p": nan}, {"min_p": nan}, {"top_k": 2.5}, {"max_new_tokens": 0},
        {"max_new_tokens": 2.5}, {"max_new_tokens": True}, {"seed": 2**63}, {"seed": 1.5}, {"seed": "1"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            SlotOptions(**{"max_new_tokens": 1, "seed": 0, **options})
    arguments: dict[str, Any]
    for arguments in (
        {"slots": 0}, {"slots": "2"}, {"slots": 2.0}, {"max_length": 1}, {"max_length": 12.0},
        {"eos_token_ids": "7"}, {"eos_token_ids": [1.5]}, {"eos_token_ids": 2**63},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(arguments))):
            SlotBatch(batch.decoder, **{"slots": 1, "max_length": 12, **arguments})
    with pytest.raises(ValueError, match="decoder must be an EFTDecoder, got EFTRunners"):
        SlotBatch(batch.decoder.runners, 1, 12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="options must be SlotOptions"):
        batch.join(prompt, None)  # type: ignore[arg-type]
    assert batch.free == 1
    # What fits exactly is taken.
    batch.join([1, 2], SlotOptions(10, 0))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        batch.join(prompt, SlotOptions(3, 0))


def test_options_of_slots_may_be_numbers_of_torch_and_numpy() -> None:
    decoder = EFTDecoder(table_runners(random_tables(1, 5)), EFTConfig(draft_tokens=2))
    lengths, seeds = torch.tensor([3, 9]), np.array([4, 5], dtype=np.uint64)
    given = SlotOptions(lengths[1:], seeds[1], np.float32(0.5), np.int8(3))  # type: ignore[arg-type]
    plain = SlotOptions(9, 5, 0.5, 3)
    assert given == plain
    outputs = [
        run_through(SlotBatch(decoder, 1, 12), [(torch.tensor([1, 2]), options)], random.Random(0))
        for options in (given, plain)
    ]
    assert outputs[0] == outputs[1]


def test_the_largest_temperatures_count_as_1e30() -> None:
    decoder = EFTDecoder(table_runners(random_tables(1, 5)), EFTConfig(draft_tokens=2))
    outputs = []
    for hot in (1e30, 1e39):
        work = [(torch.tensor([1, 2]), SlotOptions(10, seed, hot, top_k=3)) for seed in range(4)]
        outputs.append(run_through(SlotBatch(decoder, 2, 12), work, random.Random(0)))
    assert outputs[0] == outputs[1]


def test_the_smallest_context_bounds_slots_and_scores() -> None:
    runners = table_runners(random_tables(1, 5))
    runners.large.max_context, runners.base.max_context = 30, 9
    decoder = EFTDecoder(runners, EFTConfig(draft_tokens=2))
    with pytest.raises(ValueError, match=r"max_length must lie in 2\.\.9, got 12"):
        SlotBatch(decoder, 1, 12)
    with pytest.raises(ValueError, match="11 tokens, and all but the last exceed the context of 9 tokens"):
        decoder.score(torch.ones(1, 11, dtype=torch.int64))
    SlotBatch(decoder, 1, 9)
    # The last token is asked about, and not read.
    decoder.score(torch.ones(1, 10, dtype=torch.int64))


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


def test_rows_of_graphs_are_few_and_slots_are_free_once_sequences_end() -> None:
    models = tiny_trio("llama")
    for slots in (1, 3, 6):
        decoder = EFTDecoder(models, EFTConfig(draft_tokens=2))
        graphs = as_with_graphs(decoder)
        batch = SlotBatch(decoder, slots, 40)
        for _ in range(3):
            for index in range(slots):
                assert batch.free == slots - index
                # Of different lengths, so that they end one after the other.
                batch.join([5, 6, 7], SlotOptions(4 + 3 * index, seed=index))
            ended, steps = 0, 0
            while ended < slots:
                ended += sum(progress.ended for progress in batch.step().values())
                assert batch.free == ended
                steps += 1
                assert steps < 40
            assert batch.step() == {}
        assert {rows for rows, *_ in graphs.keys} <= {1, 2, 4, slots}


@HOW
def test_a_join_that_fails_leaves_its_slot(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny_trio("llama")
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=2))
    run_as(decoder, how)
    wanted = decoder.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, seed=[1])[0, 3:].tolist()
    batch = SlotBatch(decoder, 3, 40)
    first = batch.join([5, 6, 7], SlotOptions(9, 1, temperature=0.0))
    tokens = batch.step().get(first, SlotProgress([], False)).tokens

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    for owner, name in ((decoder.runners.base, "fill_slot"), (batch, "_go_on")) * 2:
        once = itertools.chain([fails], itertools.repeat(getattr(owner, name)))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *given, once=once: next(once)(*given))
            with pytest.raises(torch.OutOfMemoryError):
                batch.join([8, 9], SlotOptions(9, 1))
        assert batch.free == 2
        tokens += batch.step().get(first, SlotProgress([], False)).tokens
    while batch.free < 3:
        tokens += batch.step().get(first, SlotProgress([], False)).tokens
    assert tokens == wanted


@HOW
def test_who_leaves_early_changes_nothing_for_the_others(how: str) -> None:
    whims = random.Random(8)
    models = tiny_trio("llama")
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    run_as(decoder, how)
    work = random_work(60, models.vocab_size, whims)
    wanted = alone(decoder, work, [7])
    batch = SlotBatch(decoder, 4, 40, (7,))
    outputs: dict[int, list[int]] = {}
    running: set[int] = set()
    left, waiting = set(), list(work)
    while waiting or running:
        while waiting and batch.free:
            number = batch.join(*waiting.pop(0))
            running.add(number)
            outputs[number] = []
        assert batch.free == 4 - len(running)
        if running and whims.random() < 0.2:
            number = whims.choice(sorted(running))
            batch.leave(number)
            running.remove(number)
            left.add(number)
        for number, progress in batch.step().items():
            assert number in running
            outputs[number] += progress.tokens
            if progress.ended:
                running.remove(number)
    assert len(left) > 10
    for number, tokens in outputs.items():
        assert tokens == wanted[number][: len(tokens)]
        assert number in left or tokens == wanted[number]
    for number in (0, 99):
        with pytest.raises(ValueError, match=f"sequence {number} does not run"):
            batch.leave(number)
    with pytest.raises(ValueError, match="number must be an integer"):
        batch.leave("0")  # type: ignore[arg-type]


def test_threads_find_what_there_is_once_they_have_their_turn() -> None:
    decoder = EFTDecoder(table_runners(random_tables(1, 5)), EFTConfig(draft_tokens=2))
    prompt, options = torch.tensor([1, 2]), SlotOptions(9, 3)
    (wanted,) = alone(decoder, [(prompt, options)], [])
    batch = SlotBatch(decoder, 1, 12)
    batch.join(prompt, options)
    with ThreadPoolExecutor(3) as threads:
        with decoder.runners.turn():
            leaving = [threads.submit(batch.leave, 0) for _ in range(2)]
            stepping = threads.submit(batch.step)
            # All three are waiting by then.
            time.sleep(0.1)
        errors = [each.exception() for each in leaving]
        stepping.result()
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", "ValueError"]
        with decoder.runners.turn():
            joining = [threads.submit(batch.join, prompt, options) for _ in range(2)]
            time.sleep(0.1)
        errors = [each.exception() for each in joining]
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", "ValueError"]
    tokens: list[int] = []
    while batch.free == 0:
        tokens += batch.step()[1].tokens
    assert tokens == wanted


@HOW
def test_the_first_join_may_fail(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no graphs by then, nor a kind of calls that they would be of."""
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=2))
    run_as(decoder, how)
    batch = SlotBatch(decoder, 2, 40)

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(decoder.runners.base, "fill_slot", fails)
        with pytest.raises(torch.OutOfMemoryError):
            batch.join([8, 9], SlotOptions(9, 1))
    work = [(torch.tensor([5, 6, 7]), SlotOptions(9, seed)) for seed in range(3)]
    assert run_through(batch, work, random.Random(0)) == alone(decoder, work, [])


@HOW
def test_after_a_step_that_fails_no_sequence_goes_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models' lengths may have moved and its tokens not."""
    decoder = EFTDecoder(tiny_trio("gpt2"), EFTConfig(draft_tokens=2))
    run_as(decoder, how)
    batch = SlotBatch(decoder, 2, 40)
    batch.join([5, 6, 7], SlotOptions(9, 1))
    batch.step()

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(decoder.runners.large, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            batch.step()
    for call in (batch.step, lambda: batch.join([5, 6], SlotOptions(8, 0))):
        with pytest.raises(RuntimeError, match="begin a new SlotBatch"):
            call()
    anew = SlotBatch(decoder, 2, 40)
    anew.join([5, 6, 7], SlotOptions(9, 1))
    assert anew.step() is not None


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_numbers_that_are_none_do_not_stay_in_a_slot(family: str) -> None:
    models = tiny_trio(family)
    for model in (models.large_base, *models.small_tuned, models.small_base):
        with torch.no_grad():
            model.get_input_embeddings().weight[99] = 1e38
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    work = [(torch.tensor([5, 6, 7]), SlotOptions(6, 1))]
    batch = SlotBatch(decoder, 1, 40)
    spoilt = batch.join([4] * 20 + [99] * 3 + [4] * 3, SlotOptions(2, 0))
    while not batch.step()[spoilt].ended:
        pass
    assert run_through(batch, work, random.Random(0)) == alone(decoder, work, [])


def test_a_filter_that_comes_and_goes_begins_no_graphs_anew() -> None:
    """Graphs are of the filters in use: in slots those that were used once stay."""
    models = tiny_trio("llama")
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=2))
    graphs = as_with_graphs(decoder)
    batch = SlotBatch(decoder, 2, 40)
    outputs = []
    for law in ({"top_k": 5}, {}, {"temperature": 0.0}, {"top_k": 5}, {}, {"temperature": 0.0}):
        number = batch.join([5, 6, 7], SlotOptions(6, 1, **law))  # type: ignore[arg-type]
        before, tokens = len(graphs.keys), []
        while batch.free < 2:
            tokens += batch.step().get(number, SlotProgress([], False)).tokens
        outputs.append(tokens)
    assert len(graphs.keys) == before
    assert outputs[:3] == outputs[3:]


@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_calls_as_with_graphs_give_what_they_give_without(draft_tokens: Any) -> None:
    """Rows in powers of two, rounded spans, kept tensors, late reports: the tokens stay the same."""
    models: EFTModels = tiny_trio("llama")
    config = EFTConfig(acceptance="shared_seed", draft_tokens=draft_tokens, cost_ratio=0.2)
    plain, captured = EFTDecoder(models, config), EFTDecoder(models, config)
    graphs = as_with_graphs(captured)
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for call in range(4):
        ids = torch.randint(0, models.vocab_size, (5, 6), generator=generator)
        options: dict[str, Any] = {
            "seed": call, "do_sample": call % 2 == 0, "max_new_tokens": 17 + call, "eos_token_id": [3, 4]
        }  # fmt: skip
        wanted = plain.generate(ids, **options)
        assert torch.equal(captured.generate(ids, **options), wanted)
        assert captured.captured is not None
        kinds.append(captured.captured.kinds[-1])
        assert {rows for rows, *_ in graphs.keys} <= {1, 2, 4, 5}
    # Sampled and greedy calls alternate: each kind has its tensors.
    assert kinds[0] is kinds[2] is not kinds[1] is kinds[3]


def test_no_round_follows_the_last() -> None:
    models = tiny_trio("llama")
    ids = torch.tensor([[5, 6, 7]])
    for config in (EFTConfig(draft_tokens=3), EFTConfig(draft_tokens=3, acceptance="shared_seed")):
        rounds = []
        for how in ("plainly", "one ahead", "as with graphs"):
            decoder = EFTDecoder(models, config)
            run_as(decoder, how)
            output = decoder.generate(ids, max_new_tokens=30, seed=1, return_dict_in_generate=True)
            assert isinstance(output, EFTOutput) and output.stats is not None
            rounds.append(output.stats.rounds)
        assert rounds[0] == rounds[1] == rounds[2]


def test_graphs_are_forgotten_once_they_are_of_no_use() -> None:
    models = tiny_trio("llama")
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=2))
    graphs = as_with_graphs(decoder)
    ids = torch.tensor([[5, 6, 7]])

    def call() -> Any:
        output = decoder.generate(ids, max_new_tokens=9, seed=1)
        assert decoder.captured is not None
        return decoder.captured.kinds[-1], output

    first, before = call()
    again, same = call()
    assert again is first and torch.equal(before, same)
    # Weights in another place, though their values are the old ones'.
    layer = models.large_base.model.layers[0].mlp.gate_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    moved, same = call()
    assert moved is not first and torch.equal(before, same)
    # Other caches, though lengths may be found where those before them were.
    for batch in range(2, 6):
        kind, _ = call()
        EFTDecoder(models, EFTConfig(draft_tokens=2)).generate(ids.repeat(batch, 1), max_new_tokens=9)
        other, same = call()
        assert other is not kind and torch.equal(before, same)
    # Larger caches, and more kinds than are kept.
    for batch in range(6, 13):
        decoder.generate(ids.repeat(batch, 1), max_new_tokens=3)
        assert decoder.captured is not None and len(decoder.captured.kinds) <= 5
    assert all(key[0] in map(id, decoder.captured.kinds) for key in graphs._graphs)
