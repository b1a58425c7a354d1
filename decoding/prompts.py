"""Prompts without their padding, and the seeds of their sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculative_eft.kernels import derive_seeds

from .checks import int64_of, is_integral

__all__ = ["Prompts", "read_prompts", "read_seeds", "repeated"]


@dataclass(frozen=True)
class Prompts:
    """Prompts without their padding, right-padded with 0.

    Attributes:
        tokens: int64 [batch, longest prompt].
        lengths: int64 [batch], at least 1.
        longest: the longest prompt's length, known to the host.
    """

    tokens: Tensor
    lengths: Tensor
    longest: int


def read_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, name: str = "input_ids"
) -> Prompts:
    """Check prompts and left-align them.

    Args:
        input_ids: integers [batch, width].
        attention_mask: [batch, width], 0 where `input_ids` is padding; None where nothing is.
        vocab_size: ids at or above it are refused.
        name: what to call `input_ids` in an error.

    Raises:
        ValueError: for a wrong shape or type, an empty prompt, or an id beyond the vocabulary.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not is_integral(input_ids):
        is_tensor = isinstance(input_ids, Tensor)
        got = f"{input_ids.dtype} {list(input_ids.shape)}" if is_tensor else type(input_ids).__name__
        raise ValueError(f"{name} must be an integer tensor of shape [batch, length], got {got}")
    mask_name = name.replace("input_ids", "attention_mask")
    batch, width = input_ids.shape
    if batch == 0 or width == 0:
        raise ValueError(f"{name} is empty; every prompt needs at least one token")
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    elif not isinstance(attention_mask, Tensor):
        raise ValueError(f"{mask_name} must be a tensor, got {type(attention_mask).__name__}")
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{mask_name} of shape {list(attention_mask.shape)} does not match {name} of shape "
            f"{list(input_ids.shape)}"
        )
    else:
        mask = attention_mask.to(input_ids.device) != 0
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    if int(lengths.min()) == 0:
        raise ValueError(f"{name} has a prompt without tokens; every prompt needs at least one")
    # A stable sort moves the real tokens of each row to its left in their order.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    tokens = (input_ids.to(torch.int64) * mask).gather(1, order)[:, :longest].contiguous()
    for bound in (int(tokens.min()), int(tokens.max())):
        if not 0 <= bound < vocab_size:
            raise ValueError(f"{name} holds the id {bound}, outside the vocabulary of {vocab_size} ids")
    return Prompts(tokens, lengths, longest)


def repeated(tensor: Tensor | None, copies: int) -> Tensor | None:
    """Each row so many times; what has no rows, such as a list, is left to `read_prompts` to refuse."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or copies == 1:
        return tensor
    return tensor.repeat_interleave(copies, dim=0)


def read_seeds(seed: int | Sequence[int] | None, batch: int) -> Tensor:
    """The seed of each sequence: int64 [batch], on the CPU.

    Args:
        seed: an int (sequence i gets a seed derived from it and i), one int a sequence (a list, array or
            tensor), or None to draw one from torch's default generator.

    Raises:
        ValueError: for another type, a wrong count, or a value beyond 64 bits.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    # A tensor of one seed would do as an index, and yet it is a list as one of several is.
    one = None if getattr(seed, "ndim", 0) else int64_of(seed)
    if one is not None:
        return derive_seeds(one, batch)
    seeds = list(seed) if isinstance(seed, Iterable) and not isinstance(seed, str) else [seed]
    found = [value for value in map(int64_of, seeds) if value is not None]
    if len(found) < len(seeds):
        raise ValueError(f"seed must be an int of 64 bits, one such int a sequence, or None, got {seed!r}")
    if len(found) != batch:
        raise ValueError(f"seed has {len(found)} values for {batch} sequences")
    return torch.tensor(found, dtype=torch.int64)
