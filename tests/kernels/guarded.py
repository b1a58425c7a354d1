"""Operations over tensors that end where memory does, for a process of their own: reading on ends it."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from .cases import filtered, random_case

__all__ = ["read_beyond", "verify_rows"]

_NO_ACCESS = 0


def _guarded(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, _NO_ACCESS):
        raise OSError("a page could not be guarded")
    own = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return own.view(tensor.shape).copy_(tensor)


class _Guarded(TorchFunctionMode):
    """Has all that torch creates end before a page that nobody may touch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return _guarded(result) if func in _device_constructors() else result


def read_beyond() -> None:
    """One number too many, which has to crash."""
    with _Guarded():
        numbers = torch.zeros(5)
        ctypes.string_at(numbers.data_ptr(), 24)


def verify_rows() -> None:
    """A verification of two drafted tokens: of three rows, where kernels take four at a time."""
    with _Guarded():
        case = filtered(random_case(7), "none", conservative=True)
        case.large, case.base = case.large[:, :3], case.base[:, :3]
        case.tuned = [logits[:, :3] for logits in case.tuned]
        case.draft_tokens, case.draft_lens = case.draft_tokens[:, :2], case.draft_lens.clamp(max=2)
        case.verify("token")
