"""Options and reports of the whole suite."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.device import on_device, test_device

_CHI_SQUARE = "chi_square"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-law", action="store_true", help="also in Triton's interpreter, for an hour")
    parser.addoption("--write-docs", action="store_true", help="write the tables that tests make into docs/")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tests' tensors lie")
    # Before anything imports Triton, as the next folder's conftest may: on a CPU its kernels run in the
    # interpreter. Workers inherit it.
    if "PYTEST_XDIST_WORKER" not in os.environ and parser.parse_known_args(sys.argv[1:]).device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        # What is measured of tests' models is not kept for those of users.
        folder = tempfile.TemporaryDirectory(prefix="speculative-eft-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU that torch can use")


def is_interpreted(backend: str) -> bool:
    """Whether kernels of `backend` run in Triton's interpreter, which is slow."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def is_spared(backend: str, request: pytest.FixtureRequest) -> bool:
    """Whether kernels of `backend` run in Triton's interpreter and --every-law was not given."""
    return is_interpreted(backend) and not request.config.getoption("--every-law")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors on parallel test workers: more threads would only contend."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _patch_triton_once() -> None:
    """Its interpreter prepares the language at each call inside a kernel; at each launch is enough."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare: Any = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    prepared: list[Any] = []

    def prepare_once(function: Any) -> Any:
        if prepared:
            return None
        scope = prepare(everything)
        restore = scope.restore

        def forget() -> None:
            prepared.clear()
            restore()

        scope.restore = forget
        prepared.append(scope)
        return scope

    interpreter._patch_lang = prepare_once


@pytest.fixture(autouse=True, scope="session")
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where `--device` wants the tests' tensors."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        yield
        return
    with on_device(device):
        yield


@pytest.fixture(params=["torch", "numba", "triton"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with every implementation of the kernels that its device has."""
    if request.param == "numba" and test_device().type != "cpu":
        pytest.skip("Numba's kernels are a CPU's")
    if request.param != "torch":
        pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def record_chi_square(record_property: Callable[[str, object], None]) -> Callable[[float, float], None]:
    """Keeps a passed comparison's statistic and its degrees of freedom for the summary."""
    return lambda statistic, degrees: record_property(_CHI_SQUARE, (statistic, degrees))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    comparisons = [
        (*value, report.nodeid)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == _CHI_SQUARE
    ]
    if comparisons:
        cases = len({nodeid for *_, nodeid in comparisons})
        statistic, degrees, nodeid = max(comparisons, key=lambda row: (row[0] - row[1]) / (2 * row[1]) ** 0.5)
        terminalreporter.write_line(
            f"exactness: {len(comparisons)} joint laws in {cases} cases; largest statistic {statistic:.0f} "
            f"on {degrees} degrees of freedom, {(statistic - degrees) / (2 * degrees) ** 0.5:.1f} deviations "
            f"where 10 are allowed ({nodeid.rsplit('::', 1)[-1]})"
        )
