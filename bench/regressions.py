"""Two benchmarks of one plan: where the second is slower than the first by more than the noise."""

from __future__ import annotations

from dataclasses import dataclass

from .analysis import noise
from .benchmark import Report
from .plan import AGAIN, NAIVE

__all__ = ["Change", "changes"]

_LEAST = 0.05
"""Changes of less than this are no news, however quiet the machine."""


@dataclass(frozen=True)
class Change:
    """One decoder in one setting, before and after.

    Attributes:
        quantity: "tokens/s", or "times naive EFT", which a slower machine leaves as it is.
        change: after over before, less 1.
        tolerance: changes of less than this are noise.
    """

    label: str
    name: str
    quantity: str
    before: float
    after: float
    change: float
    tolerance: float

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        if abs(self.change) <= self.tolerance:
            return "same"
        return "faster" if self.change > 0 else "slower"


def changes(before: Report, after: Report) -> list[Change]:
    """What both reports have: each decoder's ratio to naive EFT, and naive EFT's own speed.

    The tolerance of a cell is the largest of 5%, both reports' noise in that setting (the median of the
    chosen decoder against itself), and three standard errors of each median, taken from the quartiles of its
    pairs, put together.

    Raises:
        ValueError: if they have nothing in common, or one is simulated and the other is not.
    """
    if before.simulated_acceptance != after.simulated_acceptance:
        raise ValueError("one report is simulated and the other is not, or by another acceptance")
    earlier = {result.setting: result.comparison for result in before.results}
    noises = [noise(report) for report in (before, after)]
    found = []
    for result in after.results:
        if result.setting not in earlier:
            continue
        label, old, new = result.setting.label, earlier[result.setting], result.comparison
        offs = [abs(spreads[label].median - 1) for spreads in noises if label in spreads]
        for row in new.measurements:
            if row.name.endswith(AGAIN) or row.name not in old:
                continue
            if row.name == NAIVE:
                quantity, spreads = "tokens/s", (old[row.name].tokens_per_second, row.tokens_per_second)
            else:
                quantity, spreads = "times naive EFT", (old[row.name].ratio, row.ratio)
            # The standard error of a median of n normal values is 1.2533 / sqrt(n) deviations, and the
            # quartiles are 1.349 deviations apart.
            errors = [
                1.2533 * (spread.upper_quartile - spread.lower_quartile) / 1.349 / runs**0.5 / spread.median
                for spread, runs in zip(spreads, (old.runs, new.runs), strict=True)
            ]
            found.append(
                Change(
                    label=label,
                    name=row.name,
                    quantity=quantity,
                    before=spreads[0].median,
                    after=spreads[1].median,
                    change=spreads[1].median / spreads[0].median - 1,
                    tolerance=max(_LEAST, *offs, 3 * sum(error**2 for error in errors) ** 0.5),
                )
            )
    if not found:
        raise ValueError("the reports have no setting and decoder in common")
    return found
