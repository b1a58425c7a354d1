"""Refuses everything that makes the host wait for a device, so that its absence is proven on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING_OPERATIONS = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_WAITING_METHODS = {"cpu", "numpy", "tolist"}


class HostSyncError(AssertionError):
    """The host would have waited for the device."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in _WAITING_OPERATIONS:
            raise HostSyncError(f"{func} waits for the device")
        if name in _INDEXING_OPERATIONS and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSyncError(f"{func} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # These read memory directly on a CPU and dispatch nothing.
        if getattr(func, "__name__", "") in _WAITING_METHODS and isinstance(args[0], Tensor):
            raise HostSyncError(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise `HostSyncError` for every operation inside that would wait for a device."""
    with _Methods(), _Operations():
        yield
