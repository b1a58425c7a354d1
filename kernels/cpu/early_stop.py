"""Ending a draft early, compiled for a CPU: `kernels/early_stop.py` specifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..early_stop import GRADES, PRIOR_ACCEPTED, PRIOR_TESTED
from .jit import FLOAT, MATRIX, TABLE, TABLES, VECTOR, arrays, compiled, record

if TYPE_CHECKING:
    from ..early_stop import EarlyStop

__all__ = ["EarlyStopArrays", "early_stop_arrays", "ends_draft", "learn_rows"]


@record(MATRIX, MATRIX, VECTOR, VECTOR, TABLES, VECTOR, "float32", "float32", "float32")
class EarlyStopArrays(NamedTuple):
    """An `EarlyStop` as arrays and numbers."""

    accepted: Any
    tested: Any
    least: Any
    reach: Any
    grades: Any
    least_chances: Any
    fading: Any
    prior_accepted: Any
    prior_tested: Any


_NO_COUNTS, _NO_CHANCES = np.empty((0, 0), np.float32), np.empty(0, np.float32)
_NEVER = EarlyStopArrays(
    _NO_COUNTS, _NO_COUNTS, _NO_CHANCES, _NO_CHANCES, np.empty((0, 0), np.int64), _NO_CHANCES,
    *np.zeros(3, np.float32),
)  # fmt: skip
_BOUNDS, _PRIOR = np.array(GRADES, np.float32), np.array(PRIOR_ACCEPTED, np.float32)


def early_stop_arrays(early: EarlyStop | None) -> EarlyStopArrays:
    """What ends drafts for compiled functions; empty for None."""
    if early is None:
        return _NEVER
    parts = arrays(early, "accepted", "tested", "least", "reach", "grades", "least_chances")
    numbers = np.array([early.fading, early.prior_accepted, early.prior_tested], np.float32)
    return EarlyStopArrays(*parts, *numbers)


@compiled("boolean(EarlyStopArrays, int64, int64, float32)")
def ends_draft(early: Any, sequence: int, step: int, chance: Any) -> Any:
    """Whether a draft ends with the token of `step`, which had `chance` in the draft law."""
    grade = 0
    for bound in _BOUNDS:
        grade += chance >= bound
    early.grades[sequence, step] = grade
    tested = early.tested[sequence, grade] + FLOAT(PRIOR_TESTED)
    expected = (early.accepted[sequence, grade] + _PRIOR[grade]) / tested
    reach = early.reach
    reach[sequence] = expected if step == 0 else reach[sequence] * expected
    return reach[sequence] < early.least[sequence]


@compiled(f"void(EarlyStopArrays, {TABLE}, {TABLE})")
def learn_rows(early: Any, counts: Any, accepted_lens: Any) -> None:
    """`learn` of arrays; `counts` are one more than the draft lengths, 0 for a sequence that was done."""
    accepted, tested, grades = early.accepted, early.tested, early.grades
    for sequence in range(counts.shape[0]):
        length = counts[sequence] - 1
        if length < 0:
            continue
        all_accepted, all_tested = early.prior_accepted, early.prior_tested
        for grade in range(accepted.shape[1]):
            accepted[sequence, grade] *= early.fading
            tested[sequence, grade] *= early.fading
        for step in range(min(accepted_lens[sequence] + 1, length)):
            tested[sequence, grades[sequence, step]] += FLOAT(1)
            accepted[sequence, grades[sequence, step]] += FLOAT(step < accepted_lens[sequence])
        for grade in range(accepted.shape[1]):
            all_accepted += accepted[sequence, grade]
            all_tested += tested[sequence, grade]
        place = np.int64(all_accepted / all_tested * FLOAT(early.least_chances.shape[0] - 1))
        early.least[sequence] = early.least_chances[place]
