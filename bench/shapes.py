"""Trios of random weights at the shapes of published models, and the bytes that a step of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculative_eft.models import EFTModels, ModelRunner
from speculative_eft.models.describe import cache_bytes_per_token

__all__ = [
    "LLAMA",
    "QWEN",
    "SHAPES",
    "TINY",
    "StepBytes",
    "TrioShape",
    "fill_with_noise",
    "random_model",
    "random_trio",
    "step_bytes",
    "weight_bytes",
]


@dataclass(frozen=True)
class TrioShape:
    """The configurations of a large model and of the two small ones that go with it."""

    name: str
    large: dict[str, Any]
    small: dict[str, Any]


def _sized(
    family: dict[str, Any],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **others: Any,
) -> dict[str, Any]:
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


_LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _sized(_LLAMA_2, 4096, 11_008, 32, 32, 32),
    "llama-2-13b": _sized(_LLAMA_2, 5120, 13_824, 40, 40, 40),
    "llama-2-70b": _sized(_LLAMA_2, 8192, 28_672, 80, 64, 8),
    "llama-3.2-1b": _sized(_llama_3(32.0), 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "llama-3.1-8b": _sized(_llama_3(8.0), 4096, 14_336, 32, 32, 8),
    "llama-3.1-70b": _sized(_llama_3(8.0), 8192, 28_672, 80, 64, 8),
    "qwen2.5-0.5b": _sized(_qwen(151_936, 1e-6, True), 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _sized(_qwen(151_936, 1e-6, True), 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _sized(_qwen(151_936, 1e-6, True), 2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": _sized(_qwen(152_064, 1e-6, False), 3584, 18_944, 28, 28, 4),
    "qwen2.5-32b": _sized(_qwen(152_064, 1e-5, False), 5120, 27_648, 64, 40, 8),
}
"""Configurations of published models by name, for simulations and projections without their files."""

LLAMA = TrioShape("Llama-3.1-8B, Llama-3.2-1B twice", SHAPES["llama-3.1-8b"], SHAPES["llama-3.2-1b"])

QWEN = TrioShape("Qwen2.5-32B, Qwen2.5-1.5B twice", SHAPES["qwen2.5-32b"], SHAPES["qwen2.5-1.5b"])

_TINY = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 4096}
TINY = TrioShape("tiny", _sized(_TINY, 32, 48, 2, 4, 2), _sized(_TINY, 32, 48, 1, 4, 2))


def weight_bytes(shape: TrioShape, dtype: torch.dtype) -> int:
    """Memory of the three models' weights."""
    with torch.device("meta"):
        large, small = (random_model(settings, dtype) for settings in (shape.large, shape.small))
    return sum(
        parameter.numel() * parameter.element_size()
        for model in (large, small, small)
        for parameter in model.parameters()
    )


def random_trio(shape: TrioShape, dtype: torch.dtype, device: torch.device) -> EFTModels:
    """Three models of random weights, made on `device`."""
    torch.manual_seed(0)
    with device:
        large, tuned, base = (
            random_model(settings, dtype) for settings in (shape.large, shape.small, shape.small)
        )
    return EFTModels(large, tuned, base)


def random_model(config: dict[str, Any] | PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of random weights and this configuration, of whose settings one is its `model_type`."""
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model


@torch.inference_mode()
def fill_with_noise(runner: ModelRunner, batch: int, length: int) -> None:
    """Give `runner` a cache for `batch` sequences of `length` tokens that holds random numbers."""
    runner.reserve(batch, length)
    # Layers are allocated in their first pass.
    runner.forward(torch.zeros(batch, 1, dtype=torch.int64, device=runner.device), 1)
    for stored in runner.cache.storage():
        stored.normal_()


@dataclass(frozen=True)
class StepBytes:
    """What one pass of a model has to read: its weights, and the keys and values of every sequence.

    Attributes:
        weights: bytes; of an embedding that is not the output head too, a few rows are read, which are not
            counted.
        cache: bytes of one token of one sequence.
    """

    weights: int
    cache: int

    def of(self, tokens: float) -> float:
        """Bytes of a pass over sequences that hold so many tokens together."""
        return self.weights + tokens * self.cache


def step_bytes(model: PreTrainedModel, itemsize: int | None = None) -> StepBytes:
    """What a pass of `model` reads, whether for one token a sequence or for a few.

    `itemsize` is for a copy whose weights have so many bytes each; None for the model's own.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    read = [part for part in model.parameters() if part is head.weight or part is not embedding.weight]
    weights = sum(part.numel() * (itemsize or part.element_size()) for part in read)
    return StepBytes(weights, cache_bytes_per_token(model.config, model.dtype))
