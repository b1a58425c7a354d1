"""Which kernels run where, and what their compilers leave alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from speculative_eft.kernels import backend


def test_the_backend_is_named_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    monkeypatch.delenv("SPECULATIVE_EFT_BACKEND", raising=False)
    assert backend(torch.device("cpu")) == "numba"
    assert backend(torch.device("cuda")) == "triton"
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    assert backend(torch.device("cpu")) == backend(torch.device("cuda")) == "torch"
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs Triton and tensors on a GPU"):
        backend(torch.device("cpu"))
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of torch, numba, triton, got 'cuda'"):
        backend(torch.device("cpu"))
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "numba")
    with pytest.raises(ValueError, match="needs tensors on a CPU"):
        backend(torch.device("cuda"))


def test_torch_keeps_its_number_of_threads() -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    code = (
        "import torch; torch.set_num_threads(1); "
        "from speculative_eft.kernels.cpu.threads import use_threads; "
        "assert use_threads() == torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
