"""Trios of random weights at the shapes of published models, and the bytes that a step of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from speculative_eft.models import EFTModels, ModelRunner
from speculative_eft.models.describe import cache_bytes_per_token

__all__ = [
    "LLAMA",
    "QWEN",
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


def _llama_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


_LLAMA = {
    "model_type": "llama", "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA = TrioShape(
    "Llama-3.1-8B, Llama-3.2-1B twice",
    {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_parameters": _llama_rope(8.0),
    },
    {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_parameters": _llama_rope(32.0),
    },
)  # fmt: skip

_QWEN = {
    "model_type": "qwen2", "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}  # fmt: skip
QWEN = TrioShape(
    "Qwen2.5-32B, Qwen2.5-1.5B twice",
    {
        **_QWEN, "vocab_size": 152_064, "hidden_size": 5120, "intermediate_size": 27_648,
        "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    },
    {
        **_QWEN, "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    },
)  # fmt: skip

_TINY = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = TrioShape("tiny", {**_TINY, "num_hidden_layers": 2}, {**_TINY, "num_hidden_layers": 1})


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


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model of random weights and these settings, one of which is its `model_type`."""
    config = AutoConfig.for_model(**settings)
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
