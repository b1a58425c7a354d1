"""Attention beside torch's own: the kernels of Triton, and a stand-in for flash-attn."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from speculative_eft.models import attention as attention_module


def flash_attn_with_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """What flash-attn documents for these arguments, without new keys: row i of n stands at L - n + i."""
    batch, count, heads, dim = query.shape
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[0] == batch
    assert k_cache.shape[3] == dim
    assert k_cache.stride(3) == v_cache.stride(3) == query.stride(3) == 1
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (batch,)
    assert bool((cache_seqlens <= k_cache.shape[1]).all())
    assert causal
    shared = heads // k_cache.shape[2]
    keys, values = (cache.repeat_interleave(shared, dim=2).double() for cache in (k_cache, v_cache))
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), keys) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    column = torch.arange(k_cache.shape[1])
    position = cache_seqlens[:, None, None, None] - count + torch.arange(count)[:, None]
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        scores = scores - alibi_slopes[:, None, None] * (position - column).abs()
    left, right = window_size
    hidden = column > position + (0 if causal or right < 0 else right)
    if left >= 0:
        hidden = hidden | (column < position - left)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", weights, values).to(query.dtype)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if flash-attn were installed and the processor a GPU that it knows."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_module, "_compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_module, "FLASH_DTYPES", (torch.float32, torch.bfloat16))


@pytest.fixture(params=["triton", "flash_attn"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An attention by name, made able to run here."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    elif request.param == "flash_attn":
        monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
        request.getfixturevalue("flash_attn")
    return str(request.param)
