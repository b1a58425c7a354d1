"""Caches and weights that do not fit are refused with what would fit, before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, SlotBatch
from speculative_eft.models import EFTModels, IncompatibleModelsError, caches_fit, eft_models, memory

from ..tiny_models import ragged_prompts, tiny_trio
from ..uncaptured import as_with_graphs
from .families import tiny_model

DRAFTED = 3


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the device have so many bytes beside the caches that there are."""

    def only(size: int) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: size)

    return only


def decoder() -> EFTDecoder:
    return EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=DRAFTED))


def storage(owner: EFTDecoder) -> int:
    caches = [runner.cache for runner in owner.runners.every]
    return sum(t.numel() * t.element_size() for cache in caches for t in cache.storage())


SHORT = 3 * 64 * 2 * 2 * 2 * 8 * 4
"""Bytes of 64 positions: three models' keys and values of two layers with two heads of 8 float32 numbers."""


def needed(owner: EFTDecoder, batch: int) -> int:
    """What sequences of fewer than 64 positions take."""
    return batch * (SHORT + owner.bytes_beside_caches)


def test_a_call_that_does_not_fit_names_what_does(free: Callable[[int], None]) -> None:
    owner = decoder()
    prompts, options = torch.full((5, 20), 7), {"max_new_tokens": 20}
    free(needed(owner, 4) + 10)
    with pytest.raises(ValueError, match=r"at most 4 sequences of that length, or 5 of \d+ tokens") as error:
        owner.generate(prompts, **options)
    assert "input_ids and max_new_tokens: 5 sequences of 40 tokens" in str(error.value)
    assert storage(owner) == 0
    owner.generate(prompts[:4], **options)
    assert storage(owner) == needed(owner, 4) - 4 * owner.bytes_beside_caches
    # What the caches hold is there for the next call; a smaller one needs nothing.
    free(5 * owner.bytes_beside_caches)
    owner.generate(prompts[:2], **options)
    with pytest.raises(ValueError, match="at most 4 sequences"):
        owner.generate(prompts, **options)


def test_what_a_sequence_takes_beside_its_caches() -> None:
    config = EFTConfig(draft_tokens=DRAFTED, draft_weights="own")
    # Of three models in 16 bits at least the logits of three drafted tokens and the next, and in float32 64
    # log-ratios and the corrections of as many tokens.
    assert EFTDecoder(tiny_trio("llama"), config).bytes_beside_caches == (2 * 3 * 4 + 4 * (64 + 4)) * 101


def test_scores_of_what_does_not_fit_are_refused(free: Callable[[int], None]) -> None:
    scorer = EFTDecoder(tiny_trio("llama"))
    free(10_000)
    with pytest.raises(ValueError, match=r"input_ids: 4 sequences of 11 tokens need .* would fit"):
        scorer.score(**ragged_prompts(4))
    free(2**30)
    assert scorer.score(**ragged_prompts(4)).log_probs.shape == (4, 10)


def test_so_many_tokens_fit_and_one_more_does_not(free: Callable[[int], None]) -> None:
    owner = decoder()
    free(7 * SHORT + 2 * owner.bytes_beside_caches)
    with pytest.raises(ValueError, match="of 200 tokens") as error:
        SlotBatch(EFTDecoder(context_of(256), owner.config), 2, 200)
    tokens = int(re.findall(r"or 2 of (\d+) tokens", str(error.value))[0])
    assert 64 < tokens < 192
    SlotBatch(EFTDecoder(context_of(256), owner.config), 2, tokens)
    with pytest.raises(ValueError, match=f"slots and max_length: 2 sequences of {tokens + 1} tokens"):
        SlotBatch(EFTDecoder(context_of(256), owner.config), 2, tokens + 1)


def context_of(length: int) -> EFTModels:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 101}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    one = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=length, eos_token_id=1))
    return EFTModels(one, one, one)


def test_nothing_is_refused_where_memory_is_not_known() -> None:
    assert memory.free_bytes(torch.device("cpu")) is None
    assert caches_fit(decoder().runners.every, 10**9, [10**9] * 3, 0)


def test_growing_caches_count_twice_for_a_moment_and_else_are_filled_anew(
    free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = EFTDecoder(context_of(256), EFTConfig(draft_tokens=DRAFTED))
    prompt, options = torch.full((1, 20), 7), {"max_new_tokens": 20}
    first: Any = owner.generate(prompt, return_dict_in_generate=True, **options)
    assert isinstance(first, EFTOutput)
    longer = torch.cat([first.sequences, torch.full((1, 60), 3)], dim=1)
    grown = 128 * 2 * 2 * 2 * 8 * 4
    wanted = decoder_of_same(owner).generate(longer, **options)
    # Two runners have doubled by the time that the third holds both.
    enough = owner.bytes_beside_caches + 2 * grown // 2 + grown
    lengths = [longer.shape[1]] * 3
    for size, fits in ((enough, True), (enough - 1, False)):
        free(size)
        runners = owner.runners.every
        assert caches_fit(runners, 1, lengths, owner.bytes_beside_caches, growing=True) is fits
        assert caches_fit(runners, 1, lengths, owner.bytes_beside_caches)
    kept: list[bool] = []
    runner = owner.runners.every[0]
    reserve = runner.reserve

    def noting(batch: int, length: int, keep: bool = False) -> None:
        kept.append(keep)
        reserve(batch, length, keep)

    monkeypatch.setattr(runner, "reserve", noting)
    assert torch.equal(owner.generate(longer, past_key_values=first.past_key_values, **options), wanted)
    assert kept == [False]


def decoder_of_same(owner: EFTDecoder) -> EFTDecoder:
    assert owner.models is not None
    models = owner.models
    return EFTDecoder(EFTModels(models.large_base, models.small_tuned, models.small_base), owner.config)


def test_loading_that_runs_out_of_memory_says_what_each_model_needs(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 0)
    model.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(eft_models, "check_device", lambda device: None)
    monkeypatch.setattr(eft_models, "_load", full)
    monkeypatch.setattr(eft_models, "free_bytes", lambda device: 3 * 2**30)
    monkeypatch.setattr(memory, "_gigabytes", lambda size: f"{size} bytes")
    # A tied output head counts once.
    size = sum(parameter.numel() for parameter in model.parameters())
    for dtype, each in ((torch.bfloat16, 2 * size), ("float32", 4 * size), ("auto", 4 * size)):
        with pytest.raises(IncompatibleModelsError) as error:
            EFTModels.from_pretrained(tmp_path, tmp_path, tmp_path, dtype=dtype, device_map="cuda")
        said = str(error.value)
        for role in ("large_base", "small_tuned", "small_base"):
            assert f"{role} {each} bytes" in said
        assert f"{3 * each} bytes in all, but {3 * 2**30} bytes were free" in said


def test_graphs_of_caches_that_are_to_be_replaced_go_before_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = decoder()
    graphs = as_with_graphs(owner)
    prompts = torch.full((2, 20), 7)
    owner.generate(prompts, max_new_tokens=20)
    assert graphs.keys
    held: list[int] = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: held.append(len(graphs.keys)) or 2**40)
    owner.generate(prompts, max_new_tokens=20)
    assert held.pop() > 0
    owner.generate(prompts.repeat(2, 1), max_new_tokens=20)
    assert held == [0]
