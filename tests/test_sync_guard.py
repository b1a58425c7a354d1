"""The guard refuses what makes the host wait for a device, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.sync_guard import HostSyncError, no_host_sync


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 1],
        lambda tensor: tensor.tolist(),
        lambda tensor: int(tensor[0]),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: tensor.unique(),
    ],
    ids=["item", "nonzero", "index by a mask", "tolist", "int", "bool", "unique"],
)
def test_the_guard_refuses_what_waits(wait: Callable[[Tensor], object]) -> None:
    tensor = torch.arange(3)
    with no_host_sync(), pytest.raises(HostSyncError):
        wait(tensor)


def test_the_guard_lets_pass_what_does_not_wait() -> None:
    tensor = torch.arange(3)
    with no_host_sync():
        tensor.add_(1).index_select(0, tensor[:1])
    assert tensor.tolist() == [1, 2, 3]
