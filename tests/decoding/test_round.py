"""A round waits for nothing and keeps its storage: what capturing it as a graph will need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.decoding.options import read_options
from speculative_eft.decoding.prompts import read_prompts, read_seeds
from speculative_eft.decoding.round import PhaseTimer, draft_phase, new_trace_buffers, speculative_round
from speculative_eft.kernels import noise as noise_module

from ..sync_guard import no_host_sync
from ..tiny_models import ragged_prompts, tiny_trio


def test_a_draft_is_as_long_as_was_asked_for_a_round_earlier() -> None:
    """Where rounds are ahead of the host; so lengths grow as well, one round late."""
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=1))
    decoder.lagging = True
    prompts = read_prompts(torch.tensor([[5, 6, 7]]), None, decoder.vocab_size)
    options = read_options(None, {"max_new_tokens": 20}, [], 3)
    with torch.inference_mode():
        state, plan = decoder._start(prompts, prompts, options, read_seeds(0, 1))
        drafted = []
        for wanted in (3, 3, 2, 3):
            state.draft_lens.fill_(wanted)
            draft_phase(decoder.runners, state, plan, 0, prompts.longest + 1)
            drafted.append(int(state.draft_lens))
    assert drafted == [1, 3, 2, 2]


def storages(state: object) -> Iterator[int]:
    for field in fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            yield value.data_ptr()
        elif value is not None:
            yield from storages(value)


@pytest.mark.parametrize("acceptance", ["block", "token", "shared_seed"])
@pytest.mark.parametrize("draft", ["tuned", "pair"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=["greedy", "plain", "filters"],
)
@pytest.mark.parametrize(
    "fields_of_config",
    [
        {"draft_tokens": 3},
        {"draft_tokens": "auto", "cost_ratio": 0.1, "conservative_top_p": 0.8},
        {"draft_tokens": 3, "draft_weights": "int8"},
    ],
    ids=["fixed", "adaptive", "eight bits"],
)
@pytest.mark.parametrize("batch", [1, 8])
def test_no_host_synchronisation(
    acceptance: Any,
    draft: Any,
    options: dict[str, Any],
    fields_of_config: dict[str, Any],
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    # Noise as it is made on a device; its bits are those of the host's path (tests/kernels).
    monkeypatch.setattr(noise_module, "_in_host_memory", lambda tensor: False)
    decoder = EFTDecoder(
        tiny_trio("llama"), EFTConfig(acceptance=acceptance, draft=draft, **fields_of_config)
    )
    given = ragged_prompts(batch)
    prompts = read_prompts(given["input_ids"], given["attention_mask"], decoder.vocab_size)
    resolved = read_options(None, {"max_new_tokens": 20, "return_dict_in_generate": True, **options}, [], 11)
    with torch.inference_mode():
        state, plan = decoder._start(prompts, prompts, resolved, read_seeds(0, batch))
        trace = new_trace_buffers(state, 1)
        before = list(storages(state))
        for index in range(3):
            with no_host_sync():
                speculative_round(
                    decoder.runners, state, plan, 3, prompts.longest + 4 * (index + 1), PhaseTimer(), trace
                )
        assert list(storages(state)) == before
    assert (state.generated > 0).all()
