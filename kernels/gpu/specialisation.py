"""What a kernel is compiled for ahead of time: see `kernels/compile.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .tile import Models

__all__ = ["Specialisation", "models_signature"]


@dataclass(frozen=True)
class Specialisation:
    """One variant of a kernel that runs in practice.

    A path names an argument or, with dots, what lies inside a tuple or named tuple: "logits.0",
    "models.strides".

    Attributes:
        operation: what the kernel is part of, such as "verify".
        name: tells this variant from the operation's others.
        kernel: the function that `triton.jit` made.
        signature: argument -> Triton type, such as "*bf16", "i64", "fp32"; for a tuple a tuple of types, for
            a named tuple one of its own class, in which None stands for None. Constants need not be listed.
        constants: constexpr argument -> value.
        divisible: paths of pointers and integers that are multiples of 16; of a tuple, everything inside.
        num_warps, num_stages, registers: as at the launch; registers is what a thread may have, None for the
            assembler's choice, and of stages there are fewer where they do not fit.
        stage_bytes, kept_bytes: shared memory of a stage, and beside the stages; 0 where they fit anywhere.
        waves: warps on AMD's, which are twice as wide; None for as many.
        launches: how many launches the operation takes with this variant, all its kernels together.
        wide_loads: functions made by `triton.jit` whose loads from global memory must be 16 bytes or wider;
            empty where none can be, as for a vocabulary that is a multiple of nothing.
        programmatic: whether launches overlap where a target can, which its constant PROGRAMMATIC says.
    """

    operation: str
    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    stage_bytes: int = 0
    kept_bytes: int = 0
    registers: int | None = None
    waves: int | None = None
    launches: int = 1
    wide_loads: tuple[Any, ...] = ()
    programmatic: bool = False


def models_signature(dtype: str, models: int, corrected: bool) -> Models:
    """The signature of `Models` with logits of `dtype` and perhaps a correction, which is float32."""
    logits = (f"*{dtype}",) * models + (("*fp32",) if corrected else ())
    return Models(
        logits=logits,
        strides=(("i32", "i32"),) * len(logits),
        target_weights="*fp32",
        draft_weights="*fp32",
        weight_stride="i32",
        plain_weights="*fp32",
        delta_weights="*fp32",
        sets="*fp32",
    )
