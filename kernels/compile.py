"""Compiles every Triton kernel ahead of time: `python -m speculative_eft.kernels.compile`, without a GPU.

Prints what each variant takes on each target, and fails where a kernel spills registers, where a load that
should be 16 bytes wide is narrower, or where a program takes more shared memory than there is.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gpu.specialisation import Specialisation
from .gpu.tile import stages_within

__all__ = ["MODULES", "TARGETS", "Report", "faults", "report_on"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes that a program may have."""
MODULES = (
    "verify",
    "filters",
    "draft",
    "noise",
    "commit",
    "memory",
    "attention",
    "rotated_attention",
    "layers",
)

NARROWEST = 16
"""Bytes that a load of neighbouring logits, keys or values has to have."""

_SOURCE_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_SOURCE_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_NVIDIA_LOAD = re.compile(r"\bld\.global[.\w:]*?(?:\.v(\d+))?\.[busf](\d+)\b")
_NVIDIA_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\s.*?,\s*(0x[0-9a-f]+|\d+)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_BYTES = {
    "dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4,
    "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "d16": 2, "ubyte": 1, "sbyte": 1, "u8": 1,
    "i8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What one variant takes on one target.

    Attributes:
        registers: a thread; spills: bytes of memory a thread; shared: bytes a program.
        load: bytes of the narrowest load that is meant to be wide; None where none is.
        launches: of the whole operation.
    """

    operation: str
    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    load: int | None
    launches: int


def _nested_paths(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from ((index, *rest) for rest in _nested_paths(part))
    elif value is not None:
        yield ()


def _paths(specialisation: Specialisation, name: str) -> list[tuple[int, ...]]:
    """The places of an argument, or of all that lies inside it, as Triton counts them."""
    first, *parts = name.split(".")
    path = [specialisation.kernel.arg_names.index(first)]
    value = specialisation.signature[first]
    for part in parts:
        index = int(part) if part.isdigit() else value._fields.index(part)
        path.append(index)
        value = value[index]
    return [(*path, *rest) for rest in _nested_paths(value)]


def _stages(specialisation: Specialisation, target: str) -> int:
    if not specialisation.stage_bytes:
        return specialisation.num_stages
    holds_all = TARGETS[target].backend == "cuda" and TARGETS[target].arch >= 90
    return stages_within(
        SHARED_MEMORY[target], holds_all, specialisation.num_stages, specialisation.stage_bytes,
        specialisation.kept_bytes,
    )  # fmt: skip


def _compile(specialisation: Specialisation, target: str) -> Any:
    names = specialisation.kernel.arg_names
    signature = dict(specialisation.signature) | dict.fromkeys(specialisation.constants, "constexpr")
    constants: dict[Any, Any] = dict(specialisation.constants)
    overlaps = (
        specialisation.programmatic and TARGETS[target].backend == "cuda" and TARGETS[target].arch >= 90
    )
    if overlaps:
        constants["PROGRAMMATIC"] = True
    if "NVIDIA" in constants:
        constants["NVIDIA"] = TARGETS[target].backend == "cuda"
    for name, value in signature.items():
        absent = [field for field in getattr(value, "_fields", ()) if getattr(value, field) is None]
        if absent:
            constants |= {(names.index(name), value._fields.index(field)): None for field in absent}
            signature[name] = value._replace(**dict.fromkeys(absent, "constexpr"))
    ordered = {name: signature[name] for name in names}
    attributes = {
        path: [["tt.divisibility", 16]]
        # In the same order each time, on which Triton's cache depends.
        for name in sorted(specialisation.divisible)
        for path in _paths(specialisation, name)
    }
    source = ASTSource(specialisation.kernel, ordered, constants, attributes)
    is_nvidia, waves = TARGETS[target].backend == "cuda", specialisation.waves or specialisation.num_warps
    options = {
        "num_warps": specialisation.num_warps if is_nvidia else waves,
        "num_stages": _stages(specialisation, target),
        "enable_fp_fusion": True,
    }
    if specialisation.registers is not None and is_nvidia:
        options["maxnreg"] = specialisation.registers
    if overlaps:
        options["launch_pdl"] = True
    return triton.compile(source, target=TARGETS[target], options=options)


def _wide_lines(specialisation: Specialisation) -> dict[str, list[range]]:
    """Where the functions lie whose loads must be wide: file name -> ranges of lines."""
    found: dict[str, list[range]] = {}
    for function in specialisation.wide_loads:
        lines, first = inspect.getsourcelines(function.fn)
        found.setdefault(Path(inspect.getfile(function.fn)).name, []).append(range(first, first + len(lines)))
    return found


def _load_bytes(line: str) -> int | None:
    if match := _NVIDIA_LOAD.search(line):
        return int(match[1] or 1) * int(match[2]) // 8
    if match := _NVIDIA_COPY.search(line):
        return int(match[1], 0)
    if match := _AMD_LOAD.search(line):
        return next((size for kind, size in _AMD_BYTES.items() if kind in match[1].split("_")), None)
    return None


def _narrowest_load(assembly: str, wide: Mapping[str, list[range]]) -> int | None:
    """Bytes of the narrowest load whose source lies in `wide`."""
    files: dict[str, str] = {}
    for line in assembly.splitlines():
        if match := _SOURCE_FILE.match(line):
            files[match[1]] = Path(match[3] or match[2]).name
    narrowest: int | None = None
    is_wide = is_inline = False
    for line in assembly.splitlines():
        if "inline asm" in line:
            # The lines of assembly inside count up from the line of the source.
            is_inline = "begin" in line
        elif match := _SOURCE_LINE.match(line):
            if is_inline:
                continue
            is_wide = any(int(match[2]) in lines for lines in wide.get(files.get(match[1], ""), []))
        elif is_wide and (size := _load_bytes(line)) is not None:
            narrowest = size if narrowest is None else min(narrowest, size)
    return narrowest


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of memory it spills them to."""
    tools = Path(import_module("triton.backends.nvidia").__file__ or "").parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    def number(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    # Scalar registers spill to lanes of vector registers, which is no memory.
    return number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")


def report_on(specialisation: Specialisation, target: str) -> Report:
    """Compile a variant and see what it takes."""
    compiled = _compile(specialisation, target)
    if TARGETS[target].backend == "cuda":
        registers, spills = _nvidia_resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spills = _amd_resources(assembly)
    return Report(
        operation=specialisation.operation,
        variant=specialisation.name,
        target=target,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        load=_narrowest_load(assembly, _wide_lines(specialisation)) if specialisation.wide_loads else None,
        launches=specialisation.launches,
    )


def faults(report: Report, checks_loads: bool) -> list[str]:
    """What is wrong with a variant, a line each."""
    name = f"{report.operation}, {report.variant}, {report.target}"
    found = [f"{name}: {report.spills} spilled"] if report.spills else []
    if report.shared > SHARED_MEMORY[report.target]:
        found.append(f"{name}: {report.shared} bytes of shared memory, more than there are")
    if checks_loads and (report.load is None or report.load < NARROWEST):
        found.append(f"{name}: a load of {report.load} bytes where {NARROWEST} are possible")
    return found


@cache
def _specialisations(operation: str) -> tuple[Specialisation, ...]:
    return tuple(import_module(f"{__package__}.gpu.{operation}").specialisations())


def _every_third(variants: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Every third variant of each kernel, the first among them."""
    kept, seen = [], Counter[str]()
    for operation, index in variants:
        kernel = _specialisations(operation)[index].kernel.__name__
        if seen[kernel] % 3 == 0:
            kept.append((operation, index))
        seen[kernel] += 1
    return kept


def _report_on_index(work: tuple[str, int, str]) -> tuple[Report, list[str]]:
    # Kernels cannot be sent to another process, but be found there.
    operation, index, target = work
    specialisation = _specialisations(operation)[index]
    report = report_on(specialisation, target)
    return report, faults(report, bool(specialisation.wide_loads))


def _table(reports: list[Report]) -> Table:
    table = Table("operation", "variant", "target")
    for title in ("registers", "spills", "shared", "load", "launches"):
        table.add_column(title, justify="right")
    for report in reports:
        table.add_row(*("-" if value is None else str(value) for value in asdict(report).values()))
    return table


def _write(path: Path, reports: list[Report]) -> None:
    """Replace the JSON at once: a run that is cut off leaves what it had, and never half a file."""
    facts = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(path)


def main(
    target: Annotated[list[str] | None, typer.Option(help="Compile for this target; repeatable.")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="Compile this operation; repeatable.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table there as JSON.")] = None,
    sparsely: Annotated[
        bool,
        typer.Option("--sparsely", help="Every third variant of a kernel, each for one target, in turn."),
    ] = False,
) -> None:
    """Compile every kernel for every target; fail if one spills, loads narrowly or takes too much memory."""
    for given, known, name in ((target, tuple(TARGETS), "--target"), (operation, MODULES, "--operation")):
        for value in given or ():
            if value not in known:
                raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=name)
    targets = target or list(TARGETS)
    variants = [
        (module, index) for module in operation or MODULES for index in range(len(_specialisations(module)))
    ]
    if sparsely:
        variants = _every_third(variants)
    work = [
        (*variant, one)
        for place, variant in enumerate(variants)
        for one in ([targets[place % len(targets)]] if sparsely else targets)
    ]
    reports: list[Report] = []
    wrong: list[str] = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for report, found in pool.map(_report_on_index, work):
            reports.append(report)
            wrong += found
            if json_path is not None:
                _write(json_path, reports)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(reports))
    for fault in wrong:
        print(fault, file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
