"""Trios of random weights at the shapes of published models, and the bytes that a step of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculative_eft.models import EFTModels, ModelRunner
from speculative_eft.models.describe import cache_bytes_per_token

from .published import SHAPES, sized

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


LLAMA = TrioShape("Llama-3.1-8B, Llama-3.2-1B twice", SHAPES["llama-3.1-8b"], SHAPES["llama-3.2-1b"])

QWEN = TrioShape("Qwen2.5-32B, Qwen2.5-1.5B twice", SHAPES["qwen2.5-32b"], SHAPES["qwen2.5-1.5b"])

_TINY = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 4096}
TINY = TrioShape("tiny", sized(_TINY, 32, 48, 2, 4, 2), sized(_TINY, 32, 48, 1, 4, 2))


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
