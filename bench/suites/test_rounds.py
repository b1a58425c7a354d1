"""Rounds of the bundled trio on a CPU, from the prompt to 64 tokens: `make bench`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from speculative_eft.bench.baselines import SingleModelDecoder
from speculative_eft.bench.comparison import Decoder
from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels
from speculative_eft.models.demo import held_out_prompts

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
    assert models.tokenizer is not None
    prompt = torch.tensor([models.tokenizer(held_out_prompts()[0]).input_ids])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    decoder = DECODERS[name](models)
    # One seed for all rounds, so that each does the same work.
    benchmark(
        decoder.generate,
        prompt.expand(batch, -1), seed=0, max_new_tokens=64, top_k=0, eos_token_id=[], **sampling,
    )  # fmt: skip
