"""Compiling every kernel ahead of time; what a kernel takes, docs/kernels.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CUT_OFF = """
import sys
from pathlib import Path

from speculative_eft.kernels import compile as module


class Pool:
    def __init__(self, max_workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def map(self, function, work):
        for operation, index, target in work[:2]:
            yield module.Report(operation, str(index), target, 32, 0, 0, None, 1), []
        raise SystemExit(9)


module.ProcessPoolExecutor = Pool
module.main(operation=["noise"], json_path=Path(sys.argv[1]))
"""


def test_what_is_cut_off_has_written_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    # The module is not to be had where kernels are interpreted, as in these tests.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CUT_OFF, str(path)]
    assert subprocess.run(command, env=environment).returncode == 9
    kernels = json.loads(path.read_text())["kernels"]
    assert [kernel["operation"] for kernel in kernels] == ["noise", "noise"]
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
