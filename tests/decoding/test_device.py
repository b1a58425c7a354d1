"""Prompts in the host's memory and rounds of real models, on any device; `make gpu` runs this on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder, SlotBatch, SlotOptions
from speculative_eft.models import EFTModels

from ..device import on_device, test_device
from ..exactness.sampling import table_runners
from ..models.families import OF_OTHER_LAYERS, tiny_model
from ..table_models import random_tables
from ..tiny_models import ragged_prompts, tiny_trio


def placed(large: Any, tuned: Any, base: Any = None) -> EFTModels:
    """These models on the device, on a GPU by fused layers, which "auto" has for larger heads alone."""
    on_gpu = test_device().type == "cuda"
    large, tuned = large.to(test_device()), tuned.to(test_device())
    base = None if base is None else base.to(test_device())
    return EFTModels(large, tuned, base, attention="triton" if on_gpu else "auto")


def placed_trio(family: str) -> EFTModels:
    models = tiny_trio(family)
    return placed(models.large_base, models.small_tuned[0], models.small_base)


def assert_replayed(decoder: EFTDecoder) -> None:
    """On a GPU some rounds were captured."""
    if test_device().type == "cuda":
        assert decoder.captured is not None
        assert any(graphs is not None for graphs in decoder.captured.graphs._graphs.values())


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


@pytest.mark.parametrize(
    ("family", "draft", "draft_weights"),
    [
        *(("llama", draft, weights) for draft in ("tuned", "pair") for weights in ("own", "int8")),
        *((family, "tuned", "own") for family in OF_OTHER_LAYERS),
    ],
)
def test_models_rounds_one_ahead_of_the_host_equal_naive_ones(
    family: str, draft: Any, draft_weights: Any
) -> None:
    """On a GPU in graphs, in which models score side by side."""
    models, prompts = placed_trio(family), ragged_prompts()
    config = EFTConfig(draft_tokens=4, draft=draft, draft_weights=draft_weights)
    naive, decoder = NaiveEFTDecoder(models, config), EFTDecoder(models, config)
    wanted = naive.generate(**prompts, max_new_tokens=40)
    for _ in range(2):
        assert torch.equal(decoder.generate(**prompts, max_new_tokens=40), wanted)
    assert_replayed(decoder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft.*")
def test_rounds_of_an_adapter_and_its_base_equal_naive_ones() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from ..models.test_adapters import PLAIN, with_adapter

    models = placed(tiny_model("llama"), with_adapter(tiny_model("qwen3", 1), 2, **PLAIN))
    config, prompts = EFTConfig(draft_tokens=3, draft="pair"), ragged_prompts(3)
    wanted = NaiveEFTDecoder(models, config).generate(**prompts, max_new_tokens=20)
    decoder = EFTDecoder(models, config)
    assert torch.equal(decoder.generate(**prompts, max_new_tokens=20), wanted)
    assert_replayed(decoder)


def test_sequences_in_slots_get_what_they_get_alone() -> None:
    models = placed_trio("llama")
    config = EFTConfig(draft_tokens="auto", cost_ratio=0.2)
    decoder, other = EFTDecoder(models, config), EFTDecoder(models.with_own_caches(), config)
    laws: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 3},
    ]
    prompts = [torch.arange(2, 4 + index) for index in range(6)]
    batch = SlotBatch(decoder, 3, 50)
    waiting, outputs = list(range(6)), dict[int, list[int]]()
    while waiting or batch.free < 3:
        while waiting and batch.free:
            index = waiting.pop(0)
            number = batch.join(prompts[index], SlotOptions(20 + index, index, **laws[index % 3]))
            assert number == index
        for number, progress in batch.step().items():
            outputs.setdefault(number, []).extend(progress.tokens)
    for index, prompt in enumerate(prompts):
        law = laws[index % 3]
        sampling = {"do_sample": True, "top_k": 0, **law} if law["temperature"] else {}
        alone = other.generate(
            prompt[None], seed=[index], eos_token_id=[], max_new_tokens=20 + index, **sampling
        )
        assert alone[0, len(prompt) :].tolist() == outputs[index]
    assert_replayed(decoder)
