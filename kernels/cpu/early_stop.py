"""Ending a draft early, compiled for a CPU: `kernels/early_stop.py` specifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..early_stop import GRADES, PRIOR_ACCEPTED, PRIOR_TESTED
from .jit import FLOAT, MATRIX, TABLE, TABLES, VECTOR, arrays, compiled

if TYPE_CHECKING:
    from ..early_stop import EarlyStop

__all__ = ["EARLY_STOP", "early_stop_arrays", "ends_draft", "learn_rows"]

EARLY_STOP = f"{MATRIX}, {MATRIX}, {VECTOR}, {VECTOR}, {TABLES}, {VECTOR}, float32, float32, float32"
"""Types of `early_stop_arrays`."""

_NO_COUNTS, _NO_CHANCES = np.empty((0, 0), np.float32), np.empty(0, np.float32)
_NEVER = (
    _NO_COUNTS, _NO_COUNTS, _NO_CHANCES, _NO_CHANCES, np.empty((0, 0), np.int64), _NO_CHANCES, 0.0, 0.0, 0.0,
)  # fmt: skip
_BOUNDS, _PRIOR = np.array(GRADES, np.float32), np.array(PRIOR_ACCEPTED, np.float32)


def early_stop_arrays(early: EarlyStop | None) -> tuple[Any, ...]:
    """What ends drafts as arrays and numbers; empty ones for None."""
    if early is None:
        return _NEVER
    parts = arrays(early, "accepted", "tested", "least", "reach", "grades", "least_chances")
    return (*parts, early.fading, early.prior_accepted, early.prior_tested)


@compiled(f"boolean({MATRIX}, {MATRIX}, {VECTOR}, {VECTOR}, {TABLES}, int64, int64, float32)")
def ends_draft(
    accepted: Any, tested: Any, least: Any, reach: Any, grades: Any, sequence: int, step: int, chance: Any
) -> Any:
    """Whether a draft ends with the token of `step`, which had `chance` in the draft law."""
    grade = 0
    for bound in _BOUNDS:
        grade += chance >= bound
    grades[sequence, step] = grade
    expected = (accepted[sequence, grade] + _PRIOR[grade]) / (tested[sequence, grade] + FLOAT(PRIOR_TESTED))
    reach[sequence] = expected if step == 0 else reach[sequence] * expected
    return reach[sequence] < least[sequence]


@compiled(f"void({EARLY_STOP}, {TABLE}, {TABLE})")
def learn_rows(
    accepted: Any,
    tested: Any,
    least: Any,
    reach: Any,
    grades: Any,
    least_chances: Any,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
    counts: Any,
    accepted_lens: Any,
) -> None:
    """`learn` of arrays; `counts` are one more than the draft lengths, 0 for a sequence that was done."""
    for sequence in range(counts.shape[0]):
        length = counts[sequence] - 1
        if length < 0:
            continue
        all_accepted, all_tested = prior_accepted, prior_tested
        for grade in range(accepted.shape[1]):
            accepted[sequence, grade] *= fading
            tested[sequence, grade] *= fading
        for step in range(min(accepted_lens[sequence] + 1, length)):
            tested[sequence, grades[sequence, step]] += FLOAT(1)
            accepted[sequence, grades[sequence, step]] += FLOAT(step < accepted_lens[sequence])
        for grade in range(accepted.shape[1]):
            all_accepted += accepted[sequence, grade]
            all_tested += tested[sequence, grade]
        place = np.int64(all_accepted / all_tested * FLOAT(least_chances.shape[0] - 1))
        least[sequence] = least_chances[place]
