"""Trios of tiny random transformers that resemble each other, and prompts for them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculative_eft.models import EFTModels

from .models.families import CONTEXT, tiny_model

VOCAB = 101


def perturbed(model: PreTrainedModel, seed: int, scale: float) -> PreTrainedModel:
    """The model with noise on its weights: resembles it as a tuned model resembles its base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter.device))
    return model


def tiny_trio(family: str, context: int = CONTEXT, vocab_size: int = VOCAB, scale: float = 0.02) -> EFTModels:
    """Models of one family and size; the large base and the tuned model differ from the small base by noise.

    Args:
        scale: of the noise on each weight.
    """
    large, tuned, base = (tiny_model(family, 0, vocab_size, context) for _ in range(3))
    return EFTModels(perturbed(large, 1, scale), perturbed(tuned, 2, scale), base)


def ragged_prompts(batch: int = 8, width: int = 11) -> dict[str, Tensor]:
    """Prompts of lengths from 1 to `width`, padded on the left: `input_ids` and `attention_mask`."""
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + torch.arange(batch) * (width - 1) // max(batch - 1, 1)
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return {
        "input_ids": torch.randint(2, VOCAB, (batch, width), generator=generator) * mask,
        "attention_mask": mask,
    }
