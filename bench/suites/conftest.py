"""What the suites share: the bundled trio, compiled where it can be."""

from __future__ import annotations

import pytest
import torch

from speculative_eft.kernels import warm_up
from speculative_eft.models import EFTModels


@pytest.fixture(autouse=True, scope="session")
def _compiled() -> None:
    warm_up(torch.device("cpu"))


@pytest.fixture(scope="session")
def models() -> EFTModels:
    return EFTModels.demo()
