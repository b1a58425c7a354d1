"""No batch and no draft length has a kernel compiled anew: Triton's own keys of the launches say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft import kernels
from speculative_eft.kernels import (
    Coefficients,
    DraftLengthRule,
    NoiseKey,
    RMSNorm,
    RoundState,
    Sampling,
    Stream,
    append,
    attention,
    commit,
    derive_seeds,
    draft_step,
    exponential_noise,
    new_draft_memory,
    normalised,
    projections,
    recall,
    remember,
    rotated_attention,
    verify,
)
from speculative_eft.kernels.verify import RULES

from ..device import test_device

pytest.importorskip("triton", reason="triton is not installed")

BATCHES, DRAFTED = (1, 3, 16, 64), (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Launch:
    """By what Triton tells a kernel's compiled variants apart: properties of arguments, and constants."""

    kernel: str
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]


class Recorder:
    """Stands in a kernel's place and keeps its launches, of which none runs."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        if not isinstance(kernel, JITFunction):
            kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.name, self.launches = kernel.__name__, launches
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        _, parts, others = self.bind(*arguments, **options)
        constants = [part for part in parts if part[0] == "constexpr"]
        self.launches.append(
            Launch(
                self.name,
                tuple(part for part in parts if part[0] != "constexpr"),
                (*constants, *sorted(others.items())),
            )
        )


def entry_kernels() -> list[tuple[str, Any]]:
    """Every kernel that is launched, with its module."""
    found = {}
    for path in sorted((Path(kernels.__file__).parent / "gpu").glob("*.py")):
        name = f"{kernels.__name__}.gpu.{path.stem}"
        for variant in getattr(import_module(name), "specialisations", lambda: ())():
            found[variant.kernel.__name__] = (name, variant.kernel)
    return list(found.values())


KERNELS = entry_kernels()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of every kernel that Triton compiles, which do not run."""
    kept: list[Launch] = []
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    for name, kernel in KERNELS:
        monkeypatch.setattr(import_module(name), kernel.__name__, Recorder(kernel, kept))
    yield kept


def run_every_kernel(batch: int, drafted: int) -> None:
    for vocab_size in (96, 8_192):
        for filters in (False, True):
            sample(batch, drafted, vocab_size, filters)
        remember_rows(batch, drafted, vocab_size)
    commit_round(batch, drafted)
    attend(batch, drafted)
    run_layer(batch, drafted)


def sample(batch: int, drafted: int, vocab_size: int, filters: bool) -> None:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(batch, *shape, dtype=dtype)

    logits = [torch.empty(batch, drafted + 1, vocab_size, dtype=torch.bfloat16) for _ in range(3)]
    counts = ones(dtype=torch.int64)
    warp = {"top_k": counts, "top_p": ones(), "min_p": ones()} if filters else {}
    sampling = Sampling(ones(), **warp)
    coefficients = Coefficients(
        ones(1), ones(), ones(1), ones(), conservative_top_p=ones() if filters else None
    )
    noise = NoiseKey(derive_seeds(5, batch).to(test_device()), counts, counts)
    tokens = ones(drafted, dtype=torch.int64)
    correction = torch.empty(batch, drafted, vocab_size)
    for rule in RULES:
        verify(
            logits[0], [logits[1]], logits[2], tokens, drafted * counts, coefficients, sampling, sampling,
            noise, rule, vocab_size, correction=correction,
        )  # fmt: skip
    for row in range(drafted):
        draft_step(
            [logits[1][:, row]], logits[2][:, row], coefficients, sampling, noise, Stream.DRAFT, row,
            vocab_size, correction=correction[:, row],
        )  # fmt: skip
    exponential_noise(noise.seeds, tokens, torch.arange(drafted), Stream.DRAFT, vocab_size)


def remember_rows(batch: int, drafted: int, vocab_size: int) -> None:
    memory = new_draft_memory(batch, 7, vocab_size, test_device())
    counts = torch.ones(batch, dtype=torch.int64)
    large, base = torch.empty(2, batch, drafted + 1, vocab_size)
    block = torch.ones(batch, drafted + 1, dtype=torch.int64)
    remember(memory, large, base, block, counts, torch.zeros(batch, dtype=torch.bool))
    for previous in (None, counts):
        recall(memory, counts, previous, torch.ones(batch))


def commit_round(batch: int, drafted: int) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape or (batch,), dtype=dtype)

    shapes = {"output": (batch, 40), "tested_at": (drafted,), "accepted_at": (drafted,)}
    types = {"done": torch.bool} | dict.fromkeys(
        ("accepted_history", "tested_history", "prior_accepted", "expected"), torch.float32
    )
    state = RoundState(**{
        field.name: zeros(*shapes.get(field.name, ()), dtype=types.get(field.name, torch.int64))
        for field in dataclasses.fields(RoundState)
    })  # fmt: skip
    rule = DraftLengthRule(torch.linspace(0, 1, drafted), 0.9, 4.0)
    overlap = zeros(batch, drafted, dtype=torch.float32)
    commit(
        state, zeros(batch, drafted), zeros(), zeros(), overlap, zeros(2), rule, [(zeros(), True)]
    )  # fmt: skip


def attend(batch: int, drafted: int) -> None:
    query, new = torch.empty(batch, drafted, 4, 64), torch.empty(batch, drafted, 2, 64)
    cache = torch.empty(64, 2, 512, 64)
    lengths = torch.zeros(batch, dtype=torch.int64)
    append(new, new, cache, cache, lengths)
    attention(query, cache, cache, lengths)


def run_layer(batch: int, drafted: int) -> None:
    """Products of one row and of a few, which are other kernels, and attention."""
    weights = [torch.empty(64, 32, dtype=torch.bfloat16) for _ in range(2)]
    norm = RMSNorm(torch.empty(32, dtype=torch.bfloat16), 1e-5, 1.0)
    for rows in (1, 2 + batch % 15):
        inputs = torch.empty(rows, 32, dtype=torch.bfloat16)
        projections(inputs, weights, norm=norm, gate="silu")
        normalised(inputs, norm, inputs)
    new = torch.empty(batch, drafted, 2, 64)
    cache = torch.empty(64, 2, 512, 64)
    rotated_attention(
        new, new, new, torch.empty(512, 128), cache, cache, torch.zeros(batch, dtype=torch.int64), 512
    )


def test_nothing_is_compiled_anew_for_a_batch_or_a_draft_length(launches: list[Launch]) -> None:
    seen: dict[tuple[int, int], set[Launch]] = {}
    for drafted in DRAFTED:
        for batch in BATCHES:
            launches.clear()
            run_every_kernel(batch, drafted)
            seen[batch, drafted] = set(launches)
    assert {launch.kernel for launch in launches} == {kernel.__name__ for _, kernel in KERNELS}
    for drafted in DRAFTED:
        for batch in BATCHES:
            assert seen[batch, drafted] == seen[BATCHES[0], drafted], (batch, drafted)
        # The constants may differ: the power of two above the rows is one.
        arguments = {(launch.kernel, launch.arguments) for launch in seen[BATCHES[0], drafted]}
        assert arguments == {(launch.kernel, launch.arguments) for launch in seen[BATCHES[0], DRAFTED[0]]}
