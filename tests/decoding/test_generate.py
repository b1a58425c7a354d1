"""`generate`: equality with naive decoding, seeds, stopping, statistics and trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, RLock, Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, NaiveEFTDecoder
from speculative_eft.models import EFTModels, protocol

from ..device import skip_unless_compiled
from ..exactness.sampling import table_runners
from ..models.families import CONTEXT, FAMILIES, OF_OTHER_LAYERS
from ..table_models import random_tables
from ..tiny_models import VOCAB, ragged_prompts, tiny_trio
from ..uncaptured import as_with_graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_and_shared_seed_equal_naive(family: str) -> None:
    models, prompts = tiny_trio(family), ragged_prompts()
    naive = NaiveEFTDecoder(models)
    seeds = list(range(8))
    for options in ({}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 20, "top_p": 0.9}):
        wanted = naive.generate(**prompts, seed=seeds, max_new_tokens=20, **options)
        for drafted in range(1, 9) if not options else (1, 4, 8):
            config = EFTConfig(acceptance="shared_seed", draft_tokens=drafted)
            output = EFTDecoder(models, config).generate(**prompts, seed=seeds, max_new_tokens=20, **options)
            assert torch.equal(output, wanted), f"{drafted} drafted tokens, {options}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", *OF_OTHER_LAYERS])
def test_compiled_models_of_16_bits_equal_naive(family: str, dtype: torch.dtype) -> None:
    skip_unless_compiled(dtype)
    models, prompts, seeds = tiny_trio(family), ragged_prompts(), list(range(8))
    for model in (models.large_base, *models.small_tuned, models.small_base):
        model.to(dtype)  # type: ignore[call-arg]
    models = EFTModels(models.large_base, models.small_tuned, models.small_base)
    assert all(runner.is_compiled for runner in models.runners().every)  # type: ignore[attr-defined]
    for options in ({}, {"do_sample": True, "top_k": 0}):
        wanted = NaiveEFTDecoder(models).generate(**prompts, seed=seeds, max_new_tokens=20, **options)
        for drafted, draft in ((1, "tuned"), (4, "pair"), (8, "auto")):
            config = EFTConfig(acceptance="shared_seed", draft_tokens=drafted, draft=draft)
            output = EFTDecoder(models, config).generate(**prompts, seed=seeds, max_new_tokens=20, **options)
            assert torch.equal(output, wanted), f"{drafted} drafted tokens, {options}"


@pytest.mark.parametrize("acceptance", ["block", "token"])
@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_greedy_equals_naive_by_every_rule_and_draft(acceptance: Any, draft: Any) -> None:
    models, prompts = tiny_trio("llama"), ragged_prompts()
    for alpha, beta in ((1.0, 1.0), (0.6, 1.4)):
        wanted = NaiveEFTDecoder(models, EFTConfig(alpha, beta)).generate(**prompts, max_new_tokens=24)
        for drafted in (3, "auto"):
            config = EFTConfig(alpha, beta, drafted, acceptance, draft)
            assert torch.equal(EFTDecoder(models, config).generate(**prompts, max_new_tokens=24), wanted)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("temperature", [1e4, 1e6, 1e20])
def test_filters_know_the_order_of_tokens_at_any_temperature(
    temperature: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "numba":
        skip_unless_compiled(torch.float32)
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", backend)
    models, prompts = tiny_trio("llama"), ragged_prompts()
    wanted = NaiveEFTDecoder(models).generate(**prompts, max_new_tokens=12)
    for decoder in (NaiveEFTDecoder(models), EFTDecoder(models, EFTConfig(draft_tokens=3))):
        sampled = decoder.generate(
            **prompts, max_new_tokens=12, do_sample=True, temperature=temperature, top_k=1, seed=1
        )
        assert torch.equal(sampled, wanted)


@pytest.mark.parametrize("family", ["qwen2", *OF_OTHER_LAYERS])
@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_drafts_of_eight_bits_leave_the_law(family: str, draft: Any) -> None:
    if family in OF_OTHER_LAYERS:
        skip_unless_compiled(torch.float32)
    models, prompts = tiny_trio(family), ragged_prompts()
    greedy, sampled = {"max_new_tokens": 20}, {"max_new_tokens": 20, "do_sample": True, "seed": 3}
    config = EFTConfig(0.8, draft_tokens=4, draft=draft, draft_weights="int8")
    naive = NaiveEFTDecoder(models, config)
    assert naive.runners.drafters == []
    output = EFTDecoder(models, config).generate(**prompts, **greedy, return_dict_in_generate=True)
    assert isinstance(output, EFTOutput) and output.stats is not None and output.trace is not None
    assert torch.equal(output.sequences, naive.generate(**prompts, **greedy))
    plain = EFTDecoder(models, EFTConfig(0.8, draft_tokens=4, draft=draft)).generate(
        **prompts, **greedy, return_dict_in_generate=True
    )
    assert isinstance(plain, EFTOutput) and plain.stats is not None and plain.trace is not None
    # The copies draft nearly as well, and the trace has what the models themselves say.
    assert abs(output.stats.acceptance_rate - plain.stats.acceptance_rate) < 0.05
    for own, other in ((output.trace.tuned[0], plain.trace.tuned[0]), (output.trace.base, plain.trace.base)):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    for draft_tokens in (2, "auto"):
        shared = replace(config, acceptance="shared_seed", draft_tokens=draft_tokens)
        # With a processor rounds take the general path, where the models draft themselves.
        for processed in ({}, {"repetition_penalty": 1.3}):
            wanted = NaiveEFTDecoder(models, shared).generate(**prompts, **sampled, **processed)
            found = EFTDecoder(models, shared).generate(**prompts, **sampled, **processed)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("acceptance", ["block", "token", "shared_seed"])
@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_a_seed_gives_its_output_in_any_batch(acceptance: Any, draft_tokens: Any) -> None:
    models, prompts = tiny_trio("llama"), ragged_prompts()
    decoder = EFTDecoder(models, EFTConfig(acceptance=acceptance, draft_tokens=draft_tokens))
    options: dict[str, Any] = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 20}
    together = decoder.generate(**prompts, seed=list(range(8)), **options)
    width = prompts["input_ids"].shape[1]
    for index in (0, 3, 7):
        length = int(prompts["attention_mask"][index].sum())
        alone = decoder.generate(prompts["input_ids"][index : index + 1, -length:], seed=[index], **options)
        assert torch.equal(alone[0, length:], together[index, width:])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = decoder.generate(
        **{name: value[order] for name, value in prompts.items()}, seed=order.tolist(), **options
    )
    assert torch.equal(shuffled, together[order])


def test_one_seed_derives_a_seed_for_each_row() -> None:
    decoder = EFTDecoder(tiny_trio("llama"))
    ids = torch.full((6, 3), 5)
    options = {"do_sample": True, "max_new_tokens": 8}
    output = decoder.generate(ids, seed=3, **options)
    assert len(set(map(tuple, output.tolist()))) == 6
    assert torch.equal(decoder.generate(ids[:4], seed=3, **options), output[:4])
    torch.manual_seed(11)
    drawn = decoder.generate(ids, **options)
    torch.manual_seed(11)
    assert torch.equal(decoder.generate(ids, **options), drawn)


@pytest.mark.parametrize("several", [list, tuple, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_list_of_one_seed_is_a_list(several: Any) -> None:
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3))
    ids, options = torch.full((2, 3), 5), {"do_sample": True, "max_new_tokens": 8}
    both = decoder.generate(ids, seed=several([3, 4]), **options)
    for row, seed in enumerate((3, 4)):
        alone = decoder.generate(ids[:1], seed=several([seed]), **options)
        # Where one ends before the other it is padded.
        assert torch.equal(alone, both[row : row + 1, : alone.shape[1]])
    whole: Any = decoder.generate(ids, seed=3, **options)
    assert torch.equal(decoder.generate(ids, seed=torch.tensor(3), **options), whole)
    with pytest.raises(ValueError, match="seed has 1 values for 2 sequences"):
        decoder.generate(ids, seed=several([3]), **options)


def test_right_padding_and_holes_in_the_mask_change_nothing() -> None:
    models = tiny_trio("gpt2")
    decoder = EFTDecoder(models)
    left = decoder.generate(
        torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]]), max_new_tokens=9
    )
    right = decoder.generate(
        torch.tensor([[7, 0, 8, 9, 0]]), torch.tensor([[1, 0, 1, 1, 0]]), max_new_tokens=9
    )
    plain = decoder.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=9)
    assert torch.equal(left[:, 5:], plain[:, 3:])
    assert torch.equal(right[:, 5:], plain[:, 3:])


def test_rows_stop_at_their_own_end_of_sequence() -> None:
    models, prompts = tiny_trio("llama"), ragged_prompts()
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24}
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=5))
    free = decoder.generate(**prompts, seed=1, eos_token_id=[], **options)[:, 11:]
    ends = free[:4, [2, 7, 12, 20]].diagonal().tolist()
    output = decoder.generate(
        **prompts, seed=1, eos_token_id=ends, pad_token_id=100, return_dict_in_generate=True, **options
    )
    assert isinstance(output, EFTOutput) and output.trace is not None
    emitted = 0
    for row, unstopped in zip(output.sequences[:, 11:].tolist(), free.tolist(), strict=True):
        stop = next((index + 1 for index, token in enumerate(unstopped) if token in ends), 24)
        assert row[:stop] == unstopped[:stop]
        assert set(row[stop:]) <= {100}
        emitted += stop
    assert output.stats is not None
    assert output.stats.emitted_tokens == emitted
    # A round of a sequence ends with a token that was not drafted, but for its last.
    undrafted = emitted - sum(row.count("draft") for row in output.trace.source)
    assert undrafted <= output.stats.sequence_rounds <= undrafted + 8
    assert output.stats.sequence_rounds < 8 * output.stats.rounds


def test_tuned_model_with_its_own_prompt() -> None:
    models = tiny_trio("opt")
    ids, tuned_ids = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 9, 5, 6, 7, 8]])
    options = {"tuned_input_ids": tuned_ids, "max_new_tokens": 12}
    naive = NaiveEFTDecoder(models).generate(ids, **options)
    assert torch.equal(EFTDecoder(models).generate(ids, **options), naive)
    assert not torch.equal(NaiveEFTDecoder(models).generate(ids, max_new_tokens=12), naive)


@pytest.mark.parametrize("lagging", [False, True])
def test_drafts_go_on_after_a_first_round_of_own_prompts(lagging: bool) -> None:
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=4))
    decoder.lagging = lagging
    output = decoder.generate(
        torch.tensor([[5, 6, 7]]), tuned_input_ids=torch.tensor([[9, 5, 6, 8]]), max_new_tokens=24,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.stats.rounds < 24
    # The last round has fewer tokens left to draft.
    assert output.stats.drafted_tokens >= 4 * (output.stats.rounds - 3)


def test_target_is_the_three_models_mix() -> None:
    """Greedy output against plain transformers forwards of the three models."""
    models = tiny_trio("qwen2")
    ids = torch.tensor([[5, 6, 7]])
    output = EFTDecoder(models, EFTConfig(alpha=0.8, beta=1.2)).generate(ids, max_new_tokens=16)
    with torch.no_grad():
        for _ in range(16):
            large, tuned, base = (
                model(ids).logits[0, -1].log_softmax(-1)
                for model in (models.large_base, *models.small_tuned, models.small_base)
            )
            token = (base + 0.8 * (tuned - base) + 1.2 * (large - base)).argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    assert torch.equal(output, ids)


def test_statistics_and_trace() -> None:
    models, prompts = tiny_trio("llama"), ragged_prompts()
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=4))
    start_time = perf_counter()
    output = decoder.generate(
        **prompts,
        seed=0,
        do_sample=True,
        top_k=0,
        eos_token_id=[],
        max_new_tokens=24,
        return_dict_in_generate=True,
    )
    whole = perf_counter() - start_time
    assert isinstance(output, EFTOutput)
    stats, trace = output.stats, output.trace
    assert stats is not None
    assert trace is not None
    assert stats.emitted_tokens == 8 * 24
    assert sum(map(len, trace.source)) == stats.emitted_tokens
    sources = [source for row in trace.source for source in row]
    # The last round may accept more than the limit lets it commit.
    assert sources.count("draft") <= stats.accepted_tokens <= sources.count("draft") + 8 * 4
    assert sources.count("residual") + sources.count("bonus") <= stats.sequence_rounds
    assert 0 < stats.acceptance_rate < 1
    assert stats.tokens_per_round * stats.large_calls_per_token == pytest.approx(1)
    assert stats.tested_tokens <= stats.drafted_tokens
    assert set(stats.seconds) == {"prefill", "draft", "large", "base", "verify", "other"}
    assert 0 < sum(stats.seconds.values()) <= whole
    with torch.no_grad():
        row = output.sequences[-1:]
        start = prompts["input_ids"].shape[1]
        laws = [model(row).logits[0, start - 1 : -1] for model in (models.large_base, models.small_base)]
        tuned = models.small_tuned[0](row).logits[0, start - 1 : -1]
    chosen = row[0, start:, None]
    target = laws[0] + tuned - laws[1]
    for ours, logits in zip(
        (trace.large, trace.base, trace.tuned[0], trace.target), (*laws, tuned, target), strict=True
    ):
        wanted = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
        torch.testing.assert_close(ours[-1], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "case", ["fused", "one ahead", "as with graphs", "general", "own prompts", "rows that end"]
)
def test_sequences_beyond_64_tokens_are_seen_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass sees is rounded up to 64 positions: that it is too little shows beyond them only."""
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    models, prompts, width = tiny_trio("llama", context=256), ragged_prompts(3, 46), 46
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": [], "return_dict_in_generate": True}
    tuned_ids = prompts["input_ids"]
    if case == "one ahead":
        decoder.lagging = True
    elif case == "as with graphs":
        as_with_graphs(decoder)
    elif case == "general":
        options["repetition_penalty"] = 1.0001
    elif case == "own prompts":
        tuned_ids = torch.randint(2, VOCAB, (3, 70), generator=torch.Generator().manual_seed(1))
        options["tuned_input_ids"] = tuned_ids
    elif case == "rows that end":
        # The last row, which is the longest, then moves to the place of the first.
        options["stopping_criteria"] = [lambda ids, scores: torch.tensor([ids.shape[1] > 66, False, False])]
    output = decoder.generate(**prompts, **options)
    assert isinstance(output, EFTOutput) and output.trace is not None
    new = output.sequences[:, width:]
    for index in (1, 2):
        length = int(prompts["attention_mask"][index].sum())
        own = prompts["input_ids"][index, -length:]
        tuned = tuned_ids[index] if case == "own prompts" else own
        for model, prompt, found in (
            (models.large_base, own, output.trace.large),
            (models.small_base, own, output.trace.base),
            (models.small_tuned[0], tuned, output.trace.tuned[0]),
        ):
            with torch.no_grad():
                logits = model(torch.cat([prompt, new[index]])[None]).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(-1, new[index, :, None])[:, 0]
            torch.testing.assert_close(found[index], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("drafted", [1, 4])
def test_measured_acceptance_agrees_with_expected(drafted: int) -> None:
    """By the token rule, each test's outcome has expectation sum min(p, q) given all before it."""
    decoder = EFTDecoder(
        table_runners(random_tables(3, 6)), EFTConfig(acceptance="token", draft_tokens=drafted)
    )
    output = decoder.generate(
        torch.ones(2000, 2, dtype=torch.int64),
        seed=0,
        do_sample=True,
        top_k=0,
        max_new_tokens=30,
        return_dict_in_generate=True,
    )
    assert isinstance(output, EFTOutput)
    stats = output.stats
    assert stats is not None
    assert abs(stats.acceptance_rate - stats.expected_acceptance) < 5 * (0.25 / stats.tested_tokens) ** 0.5
    assert sum(position > 0 for position in stats.accepted_by_position) == drafted


@pytest.mark.parametrize(
    "config",
    [EFTConfig(beta=0.0, draft_tokens=3), EFTConfig((0.3, 0.5), 0.0, draft_tokens=3, draft="pair")],
    ids=["tuned", "pair"],
)
def test_without_the_large_model_the_draft_is_the_target(config: EFTConfig) -> None:
    """All of it is accepted, and a model that weighs nothing may hold anything."""
    config, tables = replace(config, remembered=0), random_tables(3, 6, len(config.alphas))
    options: dict[str, Any] = {"seed": 0, "do_sample": True, "top_k": 0, "max_new_tokens": 20}
    ids = torch.ones(50, 2, dtype=torch.int64)
    output = EFTDecoder(table_runners(tables), config).generate(ids, return_dict_in_generate=True, **options)
    assert isinstance(output, EFTOutput) and output.stats is not None and output.trace is not None
    assert output.stats.acceptance_rate == 1
    assert {source for row in output.trace.source for source in row} == {"draft", "bonus"}
    tables.large[:] = np.nan
    assert torch.equal(EFTDecoder(table_runners(tables), config).generate(ids, **options), output.sequences)


@pytest.mark.parametrize("acceptance", ["block", "token", "shared_seed"])
def test_a_conservative_set_of_all_tokens_is_no_filter(acceptance: Any) -> None:
    """Of the small pair's law the last token has a mass that float32 does not hold, of the target half."""
    tables = random_tables(4, 5)
    for table in (tables.base, *tables.tuned):
        table[..., -1] = -200
    tables.large[..., -1] = 4
    given = {**ragged_prompts(6), "do_sample": True, "top_k": 0, "max_new_tokens": 12, "seed": 5}
    given["input_ids"] = given["input_ids"] % 5
    outputs, scores = [], []
    for top_p in (None, 1.0, 1):
        config = EFTConfig(acceptance=acceptance, draft_tokens=3, conservative_top_p=top_p)
        decoder = EFTDecoder(table_runners(tables), config)
        outputs.append(decoder.generate(**given))
        scores.append(decoder.score(outputs[0]).log_probs)
    new = outputs[0][:, -12:]
    assert (new == 4).any() and (new != 4).any()
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])
    assert torch.equal(scores[1], scores[0]) and torch.equal(scores[2], scores[0])
    assert not scores[0].isinf().any()


def test_a_processor_that_changes_nothing_changes_nothing() -> None:
    """Rounds with processors draft at the same temperature as those without."""
    config = EFTConfig(draft_tokens=3, draft_temperature=2.0)
    decoder = EFTDecoder(table_runners(random_tables(3, 6)), config)
    options: dict[str, Any] = {"seed": 0, "do_sample": True, "top_k": 0, "max_new_tokens": 20}
    ids = torch.ones(20, 2, dtype=torch.int64)
    found = decoder.generate(ids, logits_processor=[lambda tokens, scores: scores], **options)
    assert torch.equal(found, decoder.generate(ids, **options))


def test_block_rule_emits_no_fewer_tokens_a_round() -> None:
    rates = {}
    for rule in ("block", "token"):
        decoder = EFTDecoder(table_runners(random_tables(3, 6)), EFTConfig(acceptance=rule, draft_tokens=5))
        output = decoder.generate(
            torch.ones(2000, 2, dtype=torch.int64),
            seed=0,
            do_sample=True,
            top_k=0,
            max_new_tokens=40,
            return_dict_in_generate=True,
        )
        assert isinstance(output, EFTOutput)
        assert output.stats is not None
        rates[rule] = output.stats.tokens_per_round
    assert rates["block"] > rates["token"]


class Collector:
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamer_receives_the_prompt_and_each_rounds_tokens() -> None:
    streamer = Collector()
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3))
    output = decoder.generate(torch.tensor([[5, 6]]), streamer=streamer, max_new_tokens=12)
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), output[0])
    assert len(streamer.pieces) > 3
    assert streamer.ended


def test_options_resolve_as_in_transformers() -> None:
    models = tiny_trio("llama")
    ids = torch.tensor([[5, 6, 7]])
    decoder = EFTDecoder(models)
    assert decoder.generate(ids).shape[1] == 3 + 20
    assert decoder.generate(ids, max_length=9).shape[1] == 9
    assert decoder.generate(ids, max_length=CONTEXT, eos_token_id=[]).shape[1] == CONTEXT
    models.large_base.generation_config.max_new_tokens = 4
    assert decoder.generate(ids).shape[1] == 7
    config = GenerationConfig(max_new_tokens=5)
    assert decoder.generate(ids, generation_config=config).shape[1] == 8
    assert decoder.generate(ids, generation_config=config, max_new_tokens=6).shape[1] == 9


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.9}, {"typical_p": 0.9}])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
def test_the_smallest_temperatures_are_as_good_as_greedy(temperature: float, options: dict[str, Any]) -> None:
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3))
    ids = torch.tensor([[5, 6, 7], [9, 4, 30]])
    wanted = decoder.generate(ids, max_new_tokens=8)
    found = decoder.generate(ids, max_new_tokens=8, do_sample=True, temperature=temperature, **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("temperature", [1e39, 1e300, 10**40])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9}, {"repetition_penalty": 1.2}], ids=str)
def test_the_largest_temperatures_count_as_1e30(temperature: float, options: dict[str, Any]) -> None:
    ids, models = torch.tensor([[5, 6, 7]]), tiny_trio("llama")
    given: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "seed": 3, **options}
    outputs = []
    for hot in (temperature, 1e30):
        decoder = EFTDecoder(models, EFTConfig(draft_tokens=3, draft_temperature=hot))
        outputs.append(decoder.generate(ids, temperature=hot, **given))
        arguments = {"custom_generate": decoder.custom_generate, "temperature": float(hot), **given}
        outputs.append(models.large_base.generate(ids, **arguments))
        outputs.append(NaiveEFTDecoder(models).generate(ids, temperature=hot, **given))
    assert [output.tolist() for output in outputs[:3]] == [output.tolist() for output in outputs[3:]]
    assert torch.equal(outputs[0], outputs[1])


def test_integers_may_be_of_numpy_or_torch() -> None:
    decoder = EFTDecoder(tiny_trio("llama"))
    ids, options = torch.tensor([[5, 6, 7]]), {"do_sample": True, "top_k": 9}
    wanted = decoder.generate(ids, max_new_tokens=6, seed=3, eos_token_id=[8, 9], pad_token_id=8, **options)
    found = decoder.generate(
        ids, max_new_tokens=np.int64(6), seed=np.int32(3), eos_token_id=np.array([8, 9]),
        pad_token_id=torch.tensor(8), **options,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    listed = decoder.generate(ids, max_new_tokens=6, seed=[4], **options)
    assert torch.equal(decoder.generate(ids, max_new_tokens=6, seed=np.array([4]), **options), listed)


@pytest.mark.parametrize("inner", ["generate", "score"])
def test_a_call_within_a_call_needs_caches_of_its_own(inner: str) -> None:
    models, ids = tiny_trio("llama"), torch.tensor([[5, 6, 7]])
    decoder, apart = EFTDecoder(models), EFTDecoder(models.with_own_caches())
    wanted = decoder.generate(ids, max_new_tokens=8)
    with pytest.raises(RuntimeError, match="in the middle of a call"):
        decoder.generate(ids, max_new_tokens=8, streamer=lambda *_: getattr(EFTDecoder(models), inner)(ids))
    found = decoder.generate(ids, max_new_tokens=8, streamer=lambda *_: getattr(apart, inner)(ids))
    assert torch.equal(found, wanted)


def test_calls_of_several_threads_take_turns() -> None:
    models = tiny_trio("llama")
    decoders = [EFTDecoder(models, EFTConfig(draft_tokens=3)), NaiveEFTDecoder(models)]
    prompts = [torch.tensor([[5 + index, 6, 7]]) for index in range(8)]
    wanted = [decoders[0].generate(ids, max_new_tokens=24) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda job: decoders[job[0] % 2].generate(job[1], max_new_tokens=24), enumerate(prompts))
        )
    assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_threads_with_caches_of_their_own_share_the_modules(family: str) -> None:
    """transformers' modules are changed for the length of a pass, which another must not meet."""
    models, ids = tiny_trio(family), torch.tensor([[5, 6, 7]])
    decoders = [EFTDecoder(own, EFTConfig(draft_tokens=3)) for own in (models, models.with_own_caches())]
    logits = models.large_base(ids).logits
    wanted = decoders[0].generate(ids, max_new_tokens=24)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda turn: decoders[turn % 2].generate(ids, max_new_tokens=24), range(12)))
    assert all(torch.equal(own, wanted) for own in found)
    assert torch.equal(models.large_base(ids).logits, logits)


def test_who_waits_for_the_device_has_no_caches_that_another_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU is one call's at a time, and a call within a call takes caches that another thread wants."""
    device = RLock()
    monkeypatch.setattr(protocol, "on_device", lambda _: device)
    models, ids = tiny_trio("llama"), torch.tensor([[5, 6, 7]])
    outer, inner = EFTDecoder(models), EFTDecoder(models.with_own_caches())
    wanted = inner.generate(ids, max_new_tokens=4)
    asked, found = Event(), []

    def within(*_: object) -> None:
        if not found:
            asked.set()
            # Time for the other thread to take what it can before it waits.
            sleep(0.2)
            found.append(inner.generate(ids, max_new_tokens=4))

    def beside() -> None:
        asked.wait()
        inner.generate(ids, max_new_tokens=4)

    threads = [
        Thread(
            target=outer.generate, args=(ids,), kwargs={"max_new_tokens": 4, "streamer": within}, daemon=True
        ),
        Thread(target=beside, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert torch.equal(found[0], wanted)
