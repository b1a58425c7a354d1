"""What a benchmark's numbers say: noise, the cost model beside them, and why speculation loses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .benchmark import Report, Result
from .comparison import PHASES, Comparison, Measurement, Spread
from .cost_model import (
    break_even_batch,
    expected_tokens,
    measured_cost_ratio,
    speed_up_over_large,
    speed_up_over_naive,
)
from .plan import AGAIN, BASELINES, LARGE, LOOP, NAIVE, SPECULATION, TUNED

__all__ = [
    "Loss",
    "Prediction",
    "baselines_of",
    "break_evens",
    "derived",
    "losses",
    "noise",
    "noise_sentence",
    "predictions",
    "roofline_share",
]

_PHASE_NAMES = {
    "draft": "drafting",
    "large": "the large model",
    "base": "the small base",
    "verify": "verification and sampling",
    "other": "everything else",
}


@dataclass(frozen=True)
class Prediction:
    """The cost model beside one measurement of speculative EFT.

    Attributes:
        acceptance: a, the mean of sum min(p, q) over the tested tokens.
        cost_ratio: c, from naive EFT's own steps in the same setting.
        drafted: K, the mean of the lengths drafted.
        tokens_per_round, over_naive, over_large: what the model says.
        measured_tokens_per_round, measured_over_naive, measured_over_large: medians over pairs.
    """

    name: str
    acceptance: float
    cost_ratio: float
    drafted: float
    tokens_per_round: float
    measured_tokens_per_round: float
    over_naive: float
    measured_over_naive: float
    over_large: float
    measured_over_large: float


def predictions(comparison: Comparison) -> list[Prediction]:
    """A row for each speculative EFT decoder of a comparison."""
    cost_ratio = measured_cost_ratio(comparison, NAIVE)
    rows = []
    for row in comparison.measurements:
        if not row.name.startswith("EFT") or row.name.endswith(AGAIN) or row.expected_acceptance is None:
            continue
        acceptance, drafted = row.expected_acceptance, row.drafted_per_round
        rows.append(
            Prediction(
                name=row.name,
                acceptance=acceptance,
                cost_ratio=cost_ratio,
                drafted=drafted,
                tokens_per_round=expected_tokens(acceptance, drafted),
                measured_tokens_per_round=row.tokens_per_round,
                over_naive=speed_up_over_naive(acceptance, drafted, cost_ratio),
                measured_over_naive=row.ratio.median,
                over_large=speed_up_over_large(acceptance, drafted, cost_ratio),
                measured_over_large=comparison.ratio(row.name, LARGE).median,
            )
        )
    return rows


def noise(report: Report) -> dict[str, Spread]:
    """By setting of the grid: the chosen decoder's speed over its own in the same turns."""
    chosen = report.plan.chosen
    return {
        result.setting.label: result.comparison.ratio(chosen + AGAIN, chosen)
        for result in report.grid()
        if chosen + AGAIN in result.comparison
    }


def noise_sentence(report: Report) -> str:
    """What the noise is, in one sentence."""
    spreads = list(noise(report).values())
    if not spreads:
        return "No decoder was measured twice: the noise is not known."
    off = max(abs(spread.median - 1) for spread in spreads)
    half = max((spread.upper_quartile - spread.lower_quartile) / 2 for spread in spreads)
    return (
        f"Noise: {report.plan.chosen} against itself in the same turns differs by at most {100 * off:.1f}% "
        f"in the median of any setting, and half of its single pairs lie within {100 * half:.0f}% of each "
        "other or closer."
    )


def baselines_of(report: Report) -> list[str]:
    """The baselines measured anywhere in the grid."""
    return [name for name in BASELINES if any(name in result.comparison for result in report.grid())]


def break_evens(report: Report) -> list[dict[str, Any]]:
    """For each temperature and baseline: the batch at which the chosen decoder is no faster any more."""
    found = []
    grid = report.grid()
    for temperature in report.plan.temperatures:
        own = sorted(
            (result for result in grid if result.setting.temperature == temperature),
            key=lambda result: result.setting.batch,
        )
        for name in baselines_of(report):
            if name == TUNED:
                # Never overtaken: it makes none of the large model's passes.
                continue
            ratios = [
                (result.setting.batch, result.comparison.ratio(report.plan.chosen, name).median)
                for result in own
                if name in result.comparison
            ]
            if len(ratios) > 1:
                found.append(
                    {
                        "temperature": temperature,
                        "baseline": name,
                        "batch": break_even_batch(ratios),
                        "largest_measured": ratios[-1][0],
                    }
                )
    return found


@dataclass(frozen=True)
class Loss:
    """A place where speculative EFT is slower than a baseline, and why.

    Attributes:
        milliseconds: for one token, by phase: the decoder's less the baseline's.
        reason: a sentence made from the measured split.
    """

    label: str
    baseline: str
    ratio: Spread
    milliseconds: dict[str, float]
    reason: str


def losses(report: Report) -> list[Loss]:
    """Every setting and baseline that the chosen decoder loses to, in the median over pairs."""
    found = []
    for result in report.results:
        for name in BASELINES:
            if name in result.comparison:
                ratio = result.comparison.ratio(report.plan.chosen, name)
                if ratio.median < 1:
                    found.append(_loss(result, report.plan.chosen, name, ratio))
    return found


def _loss(result: Result, chosen: str, baseline: str, ratio: Spread) -> Loss:
    own, other = result.comparison[chosen], result.comparison[baseline]
    more = {phase: own.phases_per_token[phase] - other.phases_per_token[phase] for phase in PHASES}
    grown = sorted((phase for phase in PHASES if more[phase] > 0), key=lambda phase: -more[phase])
    fallen = sorted((phase for phase in PHASES if more[phase] < 0), key=lambda phase: more[phase])
    parts = [f"{_PHASE_NAMES[phase]} {1000 * more[phase]:+.0f}" for phase in grown[:3]]
    reason = "hardly, with quartiles on both sides of 1; " if ratio.upper_quartile >= 1 else ""
    reason += f"microseconds a token: {', '.join(parts)}" if parts else "no phase grew; the prefill did"
    if fallen:
        saved = ", ".join(f"{_PHASE_NAMES[phase]} {1000 * more[phase]:+.0f}" for phase in fallen[:2])
        reason += f"; saved: {saved}"
    if baseline == TUNED:
        reason += "; the tuned model alone makes none of the large model's passes, and has another law"
    else:
        pass_own, pass_other = own.milliseconds_per_round["large"], other.milliseconds_per_round["large"]
        if pass_other > 0 and pass_own > 1.1 * pass_other and other.tokens_per_round == 1:
            reason += (
                f"; a pass of the large model over a draft takes {pass_own:.2f} ms where one over a token "
                f"takes {pass_other:.2f} ms, and gives {own.tokens_per_round:.2f} tokens a sequence"
            )
        idle = 1 - sum(own.run_tokens) / own.tokens_per_round / (own.rounds * result.comparison.batch)
        if idle > 0.05:
            reason += (
                f"; {100 * idle:.0f}% of the places in its rounds are of sequences that are done already"
            )
    return Loss(result.setting.label, baseline, ratio, more, reason)


def roofline_share(report: Report, row: Measurement) -> float | None:
    """The time in which a GPU reads the weights of a round at its measured bandwidth, over the round's time.

    Each pass of a model is taken to read its weights once. None on a CPU, and for decoders whose passes are
    not known.
    """
    passes = _passes(row)
    if report.bandwidth is None or passes is None:
        return None
    sizes = {model["role"].partition("[")[0]: 0 for model in report.models}
    for model in report.models:
        sizes[model["role"].partition("[")[0]] += model["bytes"]
    read = sum(count * sizes[role] for role, count in passes.items())
    return 1000 * read / report.bandwidth / sum(row.milliseconds_per_round.values())


def _passes(row: Measurement) -> dict[str, float] | None:
    """A decoder's passes of each model a round; None where they are not known."""
    steps = row.drafted_per_round + 1
    if row.name.startswith(SPECULATION):
        return {"large_base": 1.0, "small_base": steps}
    if row.name.startswith("EFT"):
        return {"large_base": 1.0, "small_tuned": steps, "small_base": 1.0}
    all_three = {"large_base": 1.0, "small_tuned": 1.0, "small_base": 1.0}
    others = {NAIVE: all_three, LOOP: all_three, LARGE: {"large_base": 1.0}, TUNED: {"small_tuned": 1.0}}
    return others.get(row.name)


def derived(report: Report) -> dict[str, Any]:
    """All of this for the JSON; made from the rest of it alone."""
    return {
        "noise": {label: asdict(spread) for label, spread in noise(report).items()},
        "predictions": {
            result.setting.label: [asdict(row) for row in predictions(result.comparison)]
            for result in report.results
        },
        "losses": [asdict(loss) for loss in losses(report)],
        "break_even_batches": break_evens(report),
        "roofline_shares": {
            result.setting.label: {
                row.name: roofline_share(report, row) for row in result.comparison.measurements
            }
            for result in report.results
            if report.bandwidth is not None
        },
    }
