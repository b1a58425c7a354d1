"""Products of decoder layers: the Triton kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import GATES, Gate, RMSNorm, normalised, product, projections, quantised

pytest.importorskip("triton", reason="triton is not installed")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}
"""Of the results' largest: a unit in the last place of the dtype, or two."""


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(inside: int, dtype: torch.dtype, offset: float = 0.0) -> RMSNorm:
    return RMSNorm(1 + 0.1 * random(inside, dtype=dtype, seed=1), 1e-5, offset)


# Weights' rows and columns that fill no tile, that take more than one split, and what models have.
SIZES = [((48, 24, 24), 40), ((7,), 100), ((320,), 1536), ((96, 100), 130)]
# One row, as many as share a launch, and more.
ROWS = [*((FP32, rows) for rows in (1, 3, 17)), *((BF16, rows) for rows in (1, 16, 17)), (FP16, 1), (FP16, 3)]


@pytest.mark.parametrize(("dtype", "rows"), ROWS)
@pytest.mark.parametrize(("outside", "inside"), SIZES)
@pytest.mark.parametrize("case", ["plain", "normed", "added", "silu", "gelu_pytorch_tanh"])
def test_projections(
    case: str, outside: tuple[int, ...], inside: int, rows: int, dtype: torch.dtype, both: Any
) -> None:
    is_gated = case in GATES
    outside = (outside[0], outside[0]) if is_gated else outside[:1] if case == "added" else outside
    weights = [random(size, inside, dtype=dtype, seed=size) / inside**0.5 for size in outside]
    options: dict[str, Any] = {}
    if case == "normed" or is_gated:
        options = {"norm": norm_of(inside, dtype, offset=0.5 if is_gated else 0.0)}
    if is_gated:
        options["gate"] = case
    if case in ("normed", "added"):
        options["biases"] = [random(size, dtype=dtype, seed=size + 1) for size in outside]
    if case == "added":
        options |= {"residual": random(rows, *outside, dtype=dtype, seed=3), "factor": 0.7}
    inputs = random(rows, inside, dtype=dtype, seed=2)
    expected, found = both(lambda: projections(inputs, weights, **options))
    assert len(found) == len(expected) == (1 if is_gated else len(outside))
    for own, other in zip(expected, found, strict=True):
        assert other.shape == own.shape
        assert other.dtype == dtype
        error = (other.float() - own.float()).abs().max() / own.float().abs().max()
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("dtype", "rows"), [(FP32, 1), (FP32, 3), (BF16, 1), (BF16, 16), (BF16, 35), (FP16, 2)]
)
@pytest.mark.parametrize("case", ["normed", "added", "gated"])
def test_projections_by_quantised_weights(case: str, rows: int, dtype: torch.dtype, both: Any) -> None:
    inside, outside = 130, {"normed": (48, 24, 24), "added": (100,), "gated": (70, 70)}[case]
    weights = [quantised(random(size, inside, dtype=dtype, seed=seed)) for seed, size in enumerate(outside)]
    options: dict[str, Any] = {"norm": norm_of(inside, dtype)}
    if case == "gated":
        options["gate"] = "silu"
    elif case == "normed":
        options["biases"] = [random(size, dtype=dtype, seed=size) for size in outside]
    elif case == "added":
        options = {"residual": random(rows, *outside, dtype=dtype, seed=3)}
    inputs = random(rows, inside, dtype=dtype, seed=2)
    expected, found = both(lambda: projections(inputs, weights, **options))
    assert len(found) == len(expected)
    for own, other in zip(expected, found, strict=True):
        assert (other.shape, other.dtype) == (own.shape, dtype)
        assert (other - own).abs().max() < TOLERANCES[dtype] * own.abs().max()


def test_a_quantised_weight_is_the_nearest_by_rows() -> None:
    weight = random(300, 70, dtype=BF16, seed=0)
    weight[5] = 0
    found = quantised(weight)
    error = (found.numbers * found.scales[:, None] - weight.float()).abs()
    largest = weight.float().abs().amax(dim=1)
    assert (error <= largest[:, None] / 254 * 1.001).all()
    assert torch.equal(found.numbers.abs().amax(dim=1), torch.where(largest > 0, 127, 0).to(torch.int8))
    inputs = random(3, 70, dtype=FP32, seed=1)
    exact = inputs.double() @ (found.numbers.double() * found.scales.double()[:, None]).T
    assert (product(inputs, found) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("tiles", [128, 96, 64, 32])
def test_weights_of_many_tiles_and_of_few(tiles: int, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from speculative_eft.kernels.gpu import layers

    division = layers._division(tiles)
    monkeypatch.setattr(layers, "_division", lambda _: division)
    weight, inputs = random(100, 700, dtype=BF16, seed=0) / 26, random(9, 700, dtype=BF16, seed=1)
    (expected,), (found,) = both(lambda: projections(inputs, [weight]))
    assert (found - expected).abs().max() < TOLERANCES[BF16] * expected.abs().max()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_that_registers_do_not_hold(dtype: torch.dtype, both: Any) -> None:
    weight, inputs = random(24, 16_400, dtype=dtype, seed=0), random(1, 16_400, dtype=dtype, seed=1)
    (expected,), (found,) = both(lambda: projections(inputs, [weight]))
    assert (found - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize(("inside", "gate"), [(18_944, None), (9000, "silu")])
def test_long_rows_of_eight_bits_are_not_written_out(
    inside: int, gate: Gate | None, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speculative_eft.kernels.gpu import layers

    monkeypatch.setattr(layers, "product", None)
    weights = [quantised(random(5, inside, dtype=BF16, seed=seed)) for seed in range(2 if gate else 1)]
    inputs = random(2, inside, dtype=BF16, seed=2) / inside**0.5
    (expected,), (found,) = both(lambda: projections(inputs, weights, gate=gate))
    assert (found - expected).abs().max() < TOLERANCES[BF16] * expected.abs().max()


def test_the_kernels_take_weights_of_the_inputs_dtype() -> None:
    from speculative_eft.kernels.gpu.layers import takes

    inputs, weight = torch.zeros(1, 16, dtype=BF16), torch.zeros(16, 16, dtype=BF16)
    assert takes(inputs, [weight])
    assert not takes(inputs.float(), [weight])
    assert not takes(inputs, [weight, weight[:8].T.contiguous().T])
    assert takes(inputs.float(), [quantised(weight)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_weights_are_torchs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", backend)
    inputs, weight = random(2, 16, dtype=FP32, seed=0), random(16, 8, dtype=FP32, seed=1).T
    (found,) = projections(inputs, [weight])
    assert torch.equal(found, torch.nn.functional.linear(inputs, weight))


@pytest.mark.parametrize(
    ("rows", "inside", "dtype", "gate"),
    [(3, 130, BF16, "silu"), (16, 700, FP16, "silu"), (9, 130, BF16, "gelu_pytorch_tanh")],
)
def test_a_gate_within_the_products(
    rows: int, inside: int, dtype: torch.dtype, gate: Gate, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speculative_eft.kernels.gpu import layers

    # As for weights of many rows.
    monkeypatch.setattr(layers, "_FULL", 1)
    weights = [random(100, inside, dtype=dtype, seed=seed) / inside**0.5 for seed in range(2)]
    inputs, norm = random(rows, inside, dtype=dtype, seed=2), norm_of(inside, dtype)
    (expected,), (found,) = both(lambda: projections(inputs, weights, norm=norm, gate=gate))
    assert found.shape == (rows, 100)
    assert (found - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("added", [False, True])
def test_norms(added: bool, offset: float, dtype: torch.dtype, both: Any) -> None:
    inputs = random(3, 100, dtype=dtype, seed=0)
    residual = random(3, 100, dtype=dtype, seed=4) if added else None
    norm = norm_of(100, dtype, offset)
    expected, found = both(lambda: normalised(inputs, norm, residual))
    assert (found - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max()
    plain = inputs.float() / (inputs.float().square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    exact = plain * (norm.weight.float() + offset) + (0 if residual is None else residual.float())
    assert (found - exact).abs().max() < TOLERANCES[dtype] * exact.abs().max()


def test_norms_of_parts_of_rows_that_stand_apart(both: Any) -> None:
    rows = random(5, 150, dtype=FP32, seed=0)
    heads, norm = rows[:, 20:110].view(5, 3, 30), norm_of(30, FP32, offset=1.0)
    expected, found = both(lambda: normalised(heads, norm))
    assert found.shape == heads.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    each = torch.stack([normalised(head.contiguous(), norm) for head in heads.unbind(1)], 1)
    assert (found - each).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("limit", "holds_all", "stages"),
    [(232_448, True, 3), (101_376, True, 2), (101_376, False, 3), (65_536, False, 2), (10_000, True, 1)],
)
def test_a_loop_has_as_many_stages_as_shared_memory_holds(limit: int, holds_all: bool, stages: int) -> None:
    from speculative_eft.kernels.gpu.tile import stages_within

    assert stages_within(limit, holds_all, 3, 40_960) == stages
    assert stages_within(limit + 5_000, holds_all, 3, 40_960, kept=5_000) == stages
