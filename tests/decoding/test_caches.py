"""What caches hold between calls: nothing of an earlier one, whichever part of them it has used."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, SlotBatch, SlotOptions
from speculative_eft.models import EFTModels
from speculative_eft.models.runner import ModelRunner
from speculative_eft.models.slot_cache import SlotCache

from ..tiny_models import tiny_trio
from ..uncaptured import as_with_graphs


def held(models: EFTModels) -> list[int]:
    """Numbers other than 0 in each model's cache."""
    runners = models.runners().every
    assert all(isinstance(runner, ModelRunner) for runner in runners)
    return [sum(int(part.count_nonzero()) for part in runner.cache.storage()) for runner in runners]  # type: ignore[attr-defined]


def any_call(models: EFTModels, whims: random.Random) -> None:
    config = EFTConfig(
        draft_tokens=whims.choice([1, 3, 8]), acceptance=whims.choice(["block", "shared_seed"])
    )
    decoder = EFTDecoder(models, config)
    if whims.random() < 0.5:
        as_with_graphs(decoder)
    kind = whims.choice(["generate", "kept", "slots"])
    batch, length, new = whims.randint(1, 4), whims.randint(1, 90), whims.randint(1, 40)
    ids = torch.randint(5, 60, (batch, length))
    mask = (torch.arange(length) >= torch.randint(0, length, (batch, 1))).long()
    if kind == "slots":
        slots = SlotBatch(decoder, batch, length + new)
        for row in ids:
            slots.join(row, SlotOptions(whims.randint(1, new), seed=0))
        while slots.step():
            pass
        return
    options: dict[str, Any] = {"max_new_tokens": new, "return_dict_in_generate": True, "eos_token_id": []}
    output = decoder.generate(ids, mask, seed=0, **options)
    if kind == "kept":
        # Of all of it, or of its beginning: then what lay beyond is still there.
        past, ids = output.past_key_values, output.sequences  # type: ignore[union-attr]
        mask = torch.cat([mask, torch.ones(batch, new, dtype=torch.int64)], dim=1)
        kept = whims.choice([length, length + new])
        options["max_new_tokens"] = whims.randint(1, new)
        decoder.generate(ids[:, :kept], mask[:, :kept], seed=0, past_key_values=past, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("backend", ["", "torch"])
def test_a_call_begins_with_empty_caches(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", backend)
    whims = random.Random(9)
    models = tiny_trio(family, context=256)
    for _ in range(12):
        for _ in range(whims.randint(1, 3)):
            any_call(models, whims)
        assert min(held(models)) > 0
        for runner in models.runners().every:
            runner.reserve(1, 1)
        assert held(models) == [0, 0, 0]


@pytest.mark.parametrize("attention", ["sdpa", "flash_attn"])
def test_spare_positions_are_emptied_too(attention: Any) -> None:
    cache = SlotCache(2, 63, torch.device("cpu"), attention)
    stored, _ = cache.layer_storage(0, 1, 4, torch.float32)
    cache.keep(2, 63)
    stored[:, :, cache.capacity - cache.spare :] = 1
    larger = cache.grown(2, 200)
    larger.keep(2, 80)
    for each in (cache, larger):
        each.restart(1, 5)
        assert not any(part.any() for part in each.storage())
