"""Compiled kernels over tensors that end where memory does: they read nothing beyond one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..device import test_device


def run(operation: str, backend: str) -> int:
    """How a process ends that runs one of `guarded`."""
    if not sys.platform.startswith("linux") or test_device().type != "cpu":
        pytest.skip("pages are guarded on Linux, of the host's memory")
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"import torch; torch.set_num_threads(1)\nfrom tests.kernels.guarded import {operation} as run\nrun()"
    )
    environment = {**os.environ, "SPECULATIVE_EFT_BACKEND": backend}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    # What raises instead is a mistake in the test.
    assert process.returncode <= 0, process.stderr
    return process.returncode


def test_what_reads_beyond_a_guarded_tensor_crashes() -> None:
    assert run("read_beyond", "torch") < 0


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_verification_reads_nothing_beyond_a_tensor(backend: str) -> None:
    assert run("verify_rows", backend) == 0
