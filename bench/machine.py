"""Where a measurement is taken: the machine, the versions, the memory a run needs.

And what shows measurements, and saves them with all that.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speculative_eft.kernels import backend
from speculative_eft.models.costs import processor_name

from .json_files import write_json

__all__ = ["Environment", "environment", "facts", "peak_memory", "save", "show", "source_commit"]

_SOURCES = (
    "speculative_eft",
    *(f"speculative_eft.{name}" for name in ("kernels", "models", "decoding", "bench")),
)
"""Packages whose code decides what is measured; they are folders of their own in a checkout."""


@dataclass(frozen=True)
class Environment:
    """Where a measurement was taken.

    Attributes:
        cores: logical processors this process may run on.
        threads: threads of one torch operation.
        accelerators: names of the GPUs that torch sees.
        backend: the implementation of the kernels for tensors in the host's memory.
    """

    cpu: str
    cores: int
    threads: int
    accelerators: list[str]
    system: str
    python: str
    torch: str
    transformers: str
    backend: str

    @property
    def processor(self) -> str:
        """The CPU, and how much of it is used."""
        return f"{self.cpu}, {self.threads} of {self.cores} cores"

    @property
    def software(self) -> str:
        """The versions, and what the kernels are."""
        return (
            f"torch {self.torch}, transformers {self.transformers}, Python {self.python}, "
            f"kernels by {self.backend}"
        )


def environment() -> Environment:
    """The machine and the versions at hand."""
    affinity = getattr(os, "sched_getaffinity", None)
    cuda = range(torch.cuda.device_count())
    return Environment(
        cpu=processor_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerators=[torch.cuda.get_device_name(index) for index in cuda],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        backend=_backend_and_version(),
    )


def _backend_and_version() -> str:
    chosen = backend(torch.device("cpu"))
    return chosen if chosen == "torch" else f"{chosen} {version(chosen)}"


def source_commit() -> str | None:
    """The commit this package runs from, marked if its Python differs; None away from a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != root:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{' with changes' if changed else ''}"


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, the device, the versions and the sources at hand, ready for JSON."""
    found: dict[str, Any] = asdict(environment())
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    found["commit"] = source_commit()
    found["sources_sha256"] = _sources_digest()
    found["device"] = "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["cuda"] = torch.version.cuda
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found["driver_and_clocks"] = _output("nvidia-smi", "--format=csv,noheader", query)
    return found


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _sources_digest() -> str:
    """Of the package's Python: tells measurements of the same code from others without a commit."""
    digest = sha256()
    for package in _SOURCES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py") if "." in package else folder.glob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def show(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    shown = Table(*heads)
    for row in rows:
        shown.add_row(*row)
    Console(width=100).print(shown)


def save(path: Path | None, **found: object) -> None:
    """Write what was `found` to `path`, if any, as JSON, with the commit and the machine."""
    if path is not None:
        write_json(path, {"commit": source_commit(), "environment": asdict(environment()), **found})


def peak_memory(device: torch.device, run: Callable[[], object]) -> int | None:
    """The most bytes held while `run` runs, what was held before included.

    On a GPU what torch allocated there, on a CPU the process's memory; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        # Linux forgets the peak of a process that writes 5 there.
        Path("/proc/self/clear_refs").write_text("5")
        forgotten = True
    except OSError:
        forgotten = False
    run()
    if forgotten:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
    return None
