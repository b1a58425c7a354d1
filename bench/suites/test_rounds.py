"""Rounds of the bundled trio on a CPU, from the prompt to 64 tokens: `make bench`.

And with an adapter of random weights, over all linear layers of the small base, as the tuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from speculative_eft.bench.baselines import SingleModelDecoder
from speculative_eft.bench.comparison import Decoder
from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels
from speculative_eft.models.demo import held_out_prompts

_RANK = 16

DECODERS: dict[str, Callable[[EFTModels], Decoder]] = {
    "naive": NaiveEFTDecoder,
    "large-alone": SingleModelDecoder,
    "eft-k2": lambda models: EFTDecoder(models, EFTConfig(draft_tokens=2)),
    "eft-k4": lambda models: EFTDecoder(models, EFTConfig(draft_tokens=4)),
    "eft-auto": EFTDecoder,
}


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(
    benchmark: BenchmarkFixture, models: EFTModels, name: str, batch: int, temperature: float
) -> None:
    _generate(benchmark, DECODERS[name](models), models, batch, temperature)


@pytest.fixture(scope="session")
def adapted() -> EFTModels:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    models = EFTModels.demo()
    config = peft.LoraConfig(
        r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(models.small_base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return EFTModels(models.large_base, tuned, tokenizer=models.tokenizer)


@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_generate_with_an_adapter(
    benchmark: BenchmarkFixture, adapted: EFTModels, draft: Literal["tuned", "pair"]
) -> None:
    decoder = EFTDecoder(adapted, EFTConfig(draft_tokens=4, draft=draft))
    _generate(benchmark, decoder, adapted, batch=1, temperature=1.0)


def _generate(
    benchmark: BenchmarkFixture, decoder: Decoder, models: EFTModels, batch: int, temperature: float
) -> None:
    assert models.tokenizer is not None
    prompt = torch.tensor([models.tokenizer(held_out_prompts()[0]).input_ids])
    # One seed for all rounds, so that each does the same work.
    benchmark(
        decoder.generate,
        prompt.expand(batch, -1), seed=0, max_new_tokens=64, do_sample=True, temperature=temperature, top_k=0,
        eos_token_id=[],
    )  # fmt: skip
