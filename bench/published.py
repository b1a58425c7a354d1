"""Shapes of published models by name, which options are held against before torch is imported."""

from __future__ import annotations

from typing import Any

__all__ = ["SHAPES", "sized"]


def sized(
    family: dict[str, Any],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **others: Any,
) -> dict[str, Any]:
    """A configuration of the family and these sizes."""
    return {
        **family, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, **others,
    }  # fmt: skip


def _llama_3(factor: float) -> dict[str, Any]:
    """What the versions from 3.1 on share, but for the factor by which they stretch their positions."""
    return {
        "model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip


def _qwen(rows: int, eps: float, tied: bool) -> dict[str, Any]:
    """What Qwen2.5's sizes share; `rows` of the vocabulary are padded by size."""
    return {
        "model_type": "qwen2", "vocab_size": rows, "max_position_embeddings": 131_072, "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "tie_word_embeddings": tied,
    }  # fmt: skip


def _gemma_3(rows: int, window: int, rope: dict[str, Any]) -> dict[str, Any]:
    """What Gemma-3's sizes share; `rope` is how layers that see all positions turn."""
    return {
        "model_type": "gemma3_text", "vocab_size": rows, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": window, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_theta": 1_000_000.0, **rope},
        },
    }  # fmt: skip


_LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": sized(_LLAMA_2, 4096, 11_008, 32, 32, 32),
    "llama-2-13b": sized(_LLAMA_2, 5120, 13_824, 40, 40, 40),
    "llama-2-70b": sized(_LLAMA_2, 8192, 28_672, 80, 64, 8),
    "llama-3.2-1b": sized(_llama_3(32.0), 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "llama-3.1-8b": sized(_llama_3(8.0), 4096, 14_336, 32, 32, 8),
    "llama-3.1-70b": sized(_llama_3(8.0), 8192, 28_672, 80, 64, 8),
    "gemma-3-270m": sized(_gemma_3(262_144, 512, {"rope_type": "default"}), 640, 2048, 18, 4, 1),
    "gemma-3-1b": sized(_gemma_3(262_144, 512, {"rope_type": "default"}), 1152, 6912, 26, 4, 1),
    "gemma-3-4b": sized(
        _gemma_3(262_208, 1024, {"rope_type": "linear", "factor": 8.0}), 2560, 10_240, 34, 8, 4
    ),
    "qwen2.5-0.5b": sized(_qwen(151_936, 1e-6, True), 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": sized(_qwen(151_936, 1e-6, True), 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": sized(_qwen(151_936, 1e-6, True), 2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": sized(_qwen(152_064, 1e-6, False), 3584, 18_944, 28, 28, 4),
    "qwen2.5-32b": sized(_qwen(152_064, 1e-5, False), 5120, 27_648, 64, 40, 8),
}
"""Configurations of published models by name, for simulations and projections without their files."""
