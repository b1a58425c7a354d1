"""Prompts in the host's memory and rounds of real models, on any device; `make gpu` runs this on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder

from ..device import on_device
from ..exactness.sampling import table_runners
from ..table_models import random_tables
from ..tiny_models import ragged_prompts, tiny_trio


def test_prompts_may_lie_in_the_hosts_memory() -> None:
    decoder = EFTDecoder(table_runners(random_tables(0, 7)), EFTConfig(draft_tokens=3))
    with on_device(torch.device("cpu")):
        ids = torch.tensor([[1, 2, 3], [0, 4, 5]])
        mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    options = {"seed": 3, "do_sample": True, "max_new_tokens": 12, "return_dict_in_generate": True}
    output = decoder.generate(ids, mask, **options)
    assert output.sequences.device.type == "cpu"
    there = decoder.runners.large.device
    assert torch.equal(
        decoder.generate(ids.to(there), mask.to(there), **options).sequences.cpu(), output.sequences
    )
    longer = decoder.generate(output.sequences, past_key_values=output.past_key_values, **options)
    assert longer.sequences.shape == (2, 27)


@pytest.mark.parametrize("draft_weights", ["own", "int8"])
@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_models_rounds_one_ahead_of_the_host_equal_naive_ones(draft_weights: Any, draft: Any) -> None:
    """On a GPU in graphs, in which models score side by side."""
    models, prompts = tiny_trio("llama"), ragged_prompts()
    config = EFTConfig(draft_tokens=4, draft=draft, draft_weights=draft_weights)
    naive, decoder = NaiveEFTDecoder(models, config), EFTDecoder(models, config)
    wanted = naive.generate(**prompts, max_new_tokens=40)
    for _ in range(2):
        assert torch.equal(decoder.generate(**prompts, max_new_tokens=40), wanted)
