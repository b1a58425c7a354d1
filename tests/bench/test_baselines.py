"""`LargeOnlyDecoder` decodes the large model and nothing else."""

from __future__ import annotations

import pytest
import torch

from speculative_eft.bench.baselines import LargeOnlyDecoder
from speculative_eft.decoding import EFTConfig, EFTOutput, NaiveEFTDecoder
from speculative_eft.models import EFTRunners
from tests.table_models import TableRunner, random_tables

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
    alone = LargeOnlyDecoder(runners()).generate(prompts, **settings)
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
    decoder = LargeOnlyDecoder(runners())
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
        LargeOnlyDecoder(trio).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6)


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.2}, {"stop_strings": "a"}, {"max_time": 3.0}])
def test_options_it_does_not_read_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported"):
        LargeOnlyDecoder(runners()).generate(torch.tensor([[1, 2, 3]]), **option)
