"""Models whose passes give no numbers are refused by name, instead of giving tokens that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels

from ..models.families import tiny_model

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def broken(model: Any, factor: float) -> Any:
    """`model`, whose second layer's MLP gives numbers beyond float16."""
    with torch.no_grad():
        model.model.layers[-2].mlp.down_proj.weight.mul_(factor)
    return model


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("options", [{"do_sample": True}, {}, {"repetition_penalty": 1.2}], ids=str)
def test_what_is_no_number_is_refused_by_name(place: int, options: dict[str, Any]) -> None:
    models = [tiny_model("llama", seed) for seed in range(3)]
    broken(models[place], float("nan"))
    decoder = EFTDecoder(EFTModels(*models), EFTConfig(draft_tokens=3))
    name = ("large_base", "small_tuned", "small_base")[place]
    with pytest.raises(ValueError, match=rf"{name}.*\(LlamaForCausalLM, float32\) .* not finite"):
        decoder.generate(IDS, max_new_tokens=5, **options)
    with torch.no_grad():
        models[place].model.layers[-2].mlp.down_proj.weight.zero_()
    assert decoder.generate(IDS, max_new_tokens=5, **options).shape == (2, 8)


def test_numbers_beyond_float16_are_refused() -> None:
    models = [tiny_model("llama", seed).to(torch.float16) for seed in range(3)]
    broken(models[0], 1e6)
    with pytest.raises(ValueError, match=r"large_base \(LlamaForCausalLM, float16\) .* dtype=\"bfloat16\""):
        NaiveEFTDecoder(EFTModels(*models)).generate(IDS, max_new_tokens=5)


def test_a_batch_may_be_larger_than_the_caches_are_long() -> None:
    models = EFTModels(*(tiny_model("llama", seed) for seed in range(3)))
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=1))
    assert decoder.generate(IDS[:1].repeat(70, 1), max_new_tokens=2).shape == (70, 5)
