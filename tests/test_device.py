"""The tests' tensors lie where `--device` says, and the package's where the package says."""

from __future__ import annotations

import torch

from speculative_eft.kernels import derive_seeds
from tests import device
from tests.table_models import TableRunner, random_tables

META = torch.device("meta")


def test_what_a_test_creates_lies_on_the_device() -> None:
    assert torch.zeros(2).device.type == device.test_device().type
    with device.on_device(META):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
        created = (drawn, torch.tensor([1]), torch.arange(3), torch.full((2,), 1.0), torch.zeros_like(drawn))
        assert all(tensor.device == META for tensor in created)
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert derive_seeds(0, 3).device.type == "cpu"
        runner = TableRunner(random_tables(0, 4).base)
        assert runner.device == runner.table.device == META
    assert torch.zeros(2).device.type == device.test_device().type
