"""The baselines sample what they say, and nothing else."""

from __future__ import annotations

import pytest
import torch

from speculative_eft.bench.baselines import (
    AssistedDecoder,
    SingleModelDecoder,
    TransformersLoop,
    ordinary_speculation,
)
from speculative_eft.bench.prompts import prompt_batches
from speculative_eft.decoding import EFTConfig, EFTOutput, NaiveEFTDecoder
from speculative_eft.models import EFTRunners, StepCosts
from tests.table_models import TableRunner, random_tables

from .conftest import OPTIONS, TinyTrio

VOCABULARY = 12


def runners(tables_seed: int = 0) -> EFTRunners:
    """Tuned and base are one model, so that emulated fine-tuning has the large model's law."""
    tables = random_tables(tables_seed, VOCABULARY)
    return EFTRunners(TableRunner(tables.large), [TableRunner(tables.base)], TableRunner(tables.base))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "min_p": 0.05}, {"do_sample": False}]
)
def test_it_gives_what_naive_eft_gives_without_tuning(options: dict[str, float]) -> None:
    prompts = torch.tensor([[3, 1, 4], [1, 5, 9]])
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "seed": 11, **options}
    alone = SingleModelDecoder(runners()).generate(prompts, **settings)
    assert torch.equal(alone, NaiveEFTDecoder(runners(), EFTConfig()).generate(prompts, **settings))


def test_rows_are_independent_and_end_at_their_own_ends() -> None:
    prompts = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    settings = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 30,
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
    }
    decoder = SingleModelDecoder(runners())
    together = decoder.generate(prompts, mask, seed=[5, 6], return_dict_in_generate=True, **settings)
    first = decoder.generate(prompts[:1], seed=[5], **settings)[0, 4:]
    second = decoder.generate(prompts[1:, 2:], seed=[6], **settings)[0, 2:]
    assert isinstance(together, EFTOutput)
    for row, alone in zip(together.sequences[:, 4:], (first, second), strict=True):
        assert row[: len(alone)].tolist() == alone.tolist()
        assert not row[len(alone) :].any()
        assert alone[-1] in (2, 7)
    assert together.stats.emitted_tokens == len(first) + len(second)
    assert together.stats.rounds == max(len(first), len(second))
    assert together.stats.large_calls_per_token == 1.0


def test_it_minds_the_context() -> None:
    trio = runners()
    trio.large.max_context = 8
    with pytest.raises(ValueError, match="context of 8"):
        SingleModelDecoder(trio).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6)


def test_the_tuned_model_alone_is_the_tuned_model() -> None:
    trio = runners()
    prompts = torch.tensor([[3, 1, 4]])
    tuned = SingleModelDecoder(EFTRunners(trio.base, [trio.large], trio.base), "small_tuned")
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "seed": 3}
    alone = SingleModelDecoder(trio).generate(prompts, **settings)
    assert torch.equal(tuned.generate(prompts, **settings), alone)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.5)])
def test_the_loop_over_transformers_is_naive_eft(
    tiny: TinyTrio, batch: int, alpha: float, beta: float
) -> None:
    (prompts,) = prompt_batches(tiny.prompts, batch, 1)
    naive = NaiveEFTDecoder(tiny.models, EFTConfig(alpha=alpha, beta=beta))
    loop = TransformersLoop(tiny.models, alpha, beta)
    both = [
        decoder.generate(prompts.input_ids, prompts.attention_mask, do_sample=False, **OPTIONS)
        for decoder in (naive, loop)
    ]
    assert torch.equal(*both)


def test_the_loop_over_transformers_samples_from_the_target(tiny: TinyTrio) -> None:
    """The first token's shares in many sequences against the law, by chi-square."""
    count = 4000
    prompts = torch.tensor([tiny.prompts[0]]).expand(count, -1)
    options = {**OPTIONS, "max_new_tokens": 1}
    drawn = TransformersLoop(tiny.models).generate(
        prompts, do_sample=True, temperature=0.5, seed=1, **options
    )
    with torch.inference_mode():
        large, tuned, base = (
            model(prompts[:1]).logits[0, -1].double()
            for model in (tiny.models.large_base, *tiny.models.small_tuned, tiny.models.small_base)
        )
    expected = count * torch.softmax((large + tuned - base) / 0.5, dim=-1)
    seen = torch.bincount(drawn[:, -1], minlength=len(expected)).double()
    statistic = float(((seen - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 10 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_ordinary_speculation_decodes_the_large_model(tiny: TinyTrio, draft_tokens: int) -> None:
    prompts = torch.tensor([tiny.prompts[0]])
    decoder = ordinary_speculation(tiny.models.runners(), draft_tokens, StepCosts(0.2, 0.0), 1)
    output = decoder.generate(prompts, do_sample=False, return_dict_in_generate=True, **OPTIONS)
    alone = SingleModelDecoder(tiny.models).generate(prompts, do_sample=False, **OPTIONS)
    assert isinstance(output, EFTOutput) and torch.equal(output.sequences, alone)
    assert output.stats.drafted_tokens > 0


def test_ordinary_speculation_leaves_the_large_models_law() -> None:
    """Two tokens in many sequences, against the product of the large model's own laws."""
    tables = random_tables(2, 6)
    trio = EFTRunners(TableRunner(tables.large), [TableRunner(tables.tuned[0])], TableRunner(tables.base))
    count = 20_000
    prompts = torch.full((count, 1), 3)
    output = ordinary_speculation(trio, 2, StepCosts(0.2, 0.0), 1).generate(
        prompts, do_sample=True, top_k=0, max_new_tokens=2, eos_token_id=[], seed=4
    )
    law = torch.softmax(torch.from_numpy(tables.large), dim=-1)
    # Before the first token of a sequence stands token 0.
    joint = law[0, 3][:, None] * law[3]
    expected = count * joint.flatten()
    seen = torch.bincount(output[:, 1] * 6 + output[:, 2], minlength=36).double()
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < 35 + 10 * (2 * 35) ** 0.5


def test_assisted_generation_decodes_the_large_model(tiny: TinyTrio) -> None:
    prompts = torch.tensor([tiny.prompts[1]])
    kept = tiny.models.large_base.generation_config
    output = AssistedDecoder(tiny.models).generate(
        prompts, do_sample=False, return_dict_in_generate=True, **OPTIONS
    )
    alone = SingleModelDecoder(tiny.models).generate(prompts, do_sample=False, **OPTIONS)
    assert isinstance(output, EFTOutput) and torch.equal(output.sequences, alone)
    assert 1 <= output.stats.rounds <= OPTIONS["max_new_tokens"]
    assert tiny.models.large_base.generation_config is kept


def test_refusals_of_what_a_baseline_does_not_have(tiny: TinyTrio) -> None:
    prompts = torch.tensor([tiny.prompts[0]])
    with pytest.raises(ValueError, match="one prompt"):
        AssistedDecoder(tiny.models).generate(prompts.expand(2, -1), **OPTIONS)
    for decoder in (AssistedDecoder(tiny.models), TransformersLoop(tiny.models)):
        with pytest.raises(ValueError, match="top_k must be 0"):
            decoder.generate(prompts, **{**OPTIONS, "top_k": 5})
        with pytest.raises(ValueError, match="trace"):
            decoder.generate(prompts, trace=True, **OPTIONS)


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.2}, {"stop_strings": "a"}, {"max_time": 3.0}])
def test_options_it_does_not_read_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported"):
        SingleModelDecoder(runners()).generate(torch.tensor([[1, 2, 3]]), **option)
