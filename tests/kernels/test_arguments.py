"""Arguments that compiled functions find in memory: what is bound is what they read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("numba", reason="the extra [cpu] is not installed")

TYPES = "float32[:, ::1], Bound, boolean, int64[::1], int64"


class Bound(NamedTuple):
    """A record among the arguments."""

    cube: Any
    threshold: float
    flags: Any
    share: float
    is_set: bool


@pytest.fixture(scope="module")
def total() -> Any:
    from speculative_eft.kernels.cpu.arguments import arguments_at
    from speculative_eft.kernels.cpu.jit import entry, record

    record("float32[:, :, ::1]", "float32", "boolean[::1]", "float64", "boolean")(Bound)
    arguments = arguments_at(TYPES)

    @entry("void(int64)")
    def function(address: int) -> None:
        matrix, bound, doubles, out, number = arguments(address)
        flags = 0
        for flag in bound.flags:
            flags += flag
        out[0] = matrix[2, 1] * (2 if doubles else 1)
        out[1] = bound.cube[1, 2, 3] * bound.threshold
        out[2] = flags + 10 * bound.is_set
        out[3] = bound.share * 1e9
        out[4] = number
        for axis in range(3):
            out[5 + axis] = bound.cube.shape[axis]
        for token in range(matrix.shape[1]):
            out[8] += matrix[0, token]

    return function


def values(out: Any, **changed: Any) -> tuple[Any, ...]:
    fields = {
        "cube": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "threshold": 0.5,
        "flags": np.array([True, False, True]),
        "share": 1 / 3,
        "is_set": True,
    } | changed
    return np.arange(6, dtype=np.float32).reshape(3, 2), Bound(**fields), True, out, -7


def test_a_bound_call_reads_what_it_was_given_as_it_is_now(total: Any) -> None:
    from speculative_eft.kernels.cpu.arguments import bound_call

    out = np.zeros(9, np.int64)
    given = values(out)
    call = bound_call(total, TYPES, given)
    expected = [10, 11, 12, 333_333_333, -7, 2, 3, 4, 1]
    call()
    assert out.tolist() == expected
    given[0][2, 1], out[8] = 20, 0
    given[1].flags[1] = True
    del given
    call()
    assert out.tolist() == [40, 11, 13, *expected[3:]]


@pytest.mark.parametrize(
    "cube",
    [
        pytest.param(np.zeros((2, 3, 4)), id="double"),
        pytest.param(np.zeros((3, 4), np.float32), id="matrix"),
        pytest.param(np.zeros((4, 3, 2), np.float32).T, id="strides"),
    ],
)
def test_what_is_of_another_type_is_refused(cube: Any, total: Any) -> None:
    from speculative_eft.kernels.cpu.arguments import bound_call

    with pytest.raises(TypeError, match="this is no array"):
        bound_call(total, TYPES, values(np.zeros(9, np.int64), cube=cube))


def test_a_type_that_no_row_holds_is_refused(total: Any) -> None:
    from speculative_eft.kernels.cpu.arguments import bound_call

    with pytest.raises(TypeError, match="no argument can be a int32"):
        bound_call(total, "int32", (1,))
