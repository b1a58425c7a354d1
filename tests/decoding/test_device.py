"""Prompts in the host's memory, whatever the device of the models; `make gpu` runs this on a GPU."""

from __future__ import annotations

import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder

from ..device import on_device
from ..exactness.sampling import table_runners
from ..table_models import random_tables


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
