"""A benchmark from its plan to its saved report, setting by setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from speculative_eft.models import EFTModels

from .comparison import Comparison, compare, sampling_options
from .cost_model import Projection
from .json_files import write_json
from .machine import Environment, environment, source_commit
from .plan import NAIVE, Plan, Setting, build_decoders, decoder_names
from .prompts import prompt_batches, with_context
from .timing import copy_bandwidth
from .turns import can_pause

__all__ = [
    "FORMAT",
    "Report",
    "Result",
    "check_contexts",
    "missing_settings",
    "new_report",
    "run_benchmark",
    "total_runs",
]

FORMAT = 3
"""Of the JSON; grows when a reader of the old one would go wrong."""

_TURN_SECONDS = 0.04
"""Of a run before others' turns come: long enough that what they leave in the caches plays no part."""

_MOST_WEIGHTS = 2**30
"""Bytes of models whose runs pause: rounds of larger ones last longer than a turn."""

_MOST_STATE = 2**32
"""Bytes of all decoders' own state with which runs pause."""

_COPIES = 2
"""Of the reference, where runs pause."""

_LAWS_OF_A_SEQUENCE = 128
"""About as many rows of the vocabulary in float32 a decoder keeps: what it remembers, logits, laws."""


@dataclass(frozen=True)
class Result:
    """What was measured in one setting."""

    setting: Setting
    comparison: Comparison


@dataclass
class Report:
    """A benchmark, perhaps unfinished; docs/benchmarking.md describes its JSON.

    Attributes:
        command: as it was typed.
        commit: of the source, None away from a checkout.
        started: when, in UTC.
        simulated_acceptance: the chance that was forced on random networks; None for a real measurement.
        models: a row for each model.
        prompts: where they came from.
        bandwidth: measured bytes a second of a GPU's memory; None on a CPU.
        results: of the settings measured so far.
        projections: to machines that were not measured.
    """

    command: str
    commit: str | None
    started: str
    simulated_acceptance: float | None
    plan: Plan
    environment: Environment
    models: list[dict[str, Any]]
    prompts: str
    bandwidth: float | None
    results: list[Result] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)

    def grid(self) -> list[Result]:
        """The results of temperatures and batches."""
        return [result for result in self.results if result.setting.varied is None]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain containers and numbers."""
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _KEPT},
            "plan": self.plan.to_dict(),
            "environment": asdict(self.environment),
            "results": [
                {
                    "label": result.setting.label,
                    "setting": asdict(result.setting),
                    **result.comparison.to_dict(),
                }
                for result in self.results
            ],
            "projections": [asdict(projection) for projection in self.projections],
        }

    def save(self, path: Path, derived: dict[str, Any] | None = None) -> None:
        """Write the JSON in one step, so that an interrupted run leaves the last whole one."""
        write_json(path, self.to_dict() | ({} if derived is None else {"derived": derived}))

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not such JSON.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"{path} has format {saved['format']}, not {FORMAT}")
            return cls(
                **{name: saved[name] for name in _KEPT},
                plan=Plan.from_dict(saved["plan"]),
                environment=Environment(**saved["environment"]),
                results=[
                    Result(Setting(**result["setting"]), Comparison.from_dict(result))
                    for result in saved["results"]
                ],
                projections=[Projection(**projection) for projection in saved["projections"]],
            )
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not the JSON of a benchmark ({why})") from error


_KEPT = ("command", "commit", "started", "simulated_acceptance", "models", "prompts", "bandwidth")


def new_report(
    models: EFTModels, plan: Plan, command: str, prompts: str, simulated_acceptance: float | None
) -> Report:
    """A report of this machine without results."""
    device = models.runners().large.device
    return Report(
        command=command,
        commit=source_commit(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        simulated_acceptance=simulated_acceptance,
        plan=plan,
        environment=environment(),
        models=[row.to_dict() for row in models.describe()],
        prompts=prompts,
        bandwidth=copy_bandwidth(device) if device.type == "cuda" else None,
    )


def check_contexts(models: EFTModels, plan: Plan, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if a setting's prompts and new tokens do not fit into a model."""
    limit = models.runners().max_context
    for setting in plan.settings():
        prompt = setting.context or max(map(len, prompts))
        if limit is not None and prompt + setting.new_tokens > limit:
            raise ValueError(
                f"prompts of {prompt} tokens (--context) and {setting.new_tokens} new ones (--length) exceed "
                f"the models' context of {limit} tokens"
            )


def total_runs(report: Report, prompts: int) -> int:
    """Runs that are still to come, warm-ups included."""
    simulated = report.simulated_acceptance is not None
    return sum(
        len(decoder_names(report.plan, setting, simulated)) * (report.plan.runs(setting, prompts) + 1)
        for setting in missing_settings(report)
    )


def missing_settings(report: Report) -> list[Setting]:
    """What its plan has and the report does not have yet."""
    measured = {result.setting for result in report.results}
    return [setting for setting in report.plan.settings() if setting not in measured]


def _fits_many_times(report: Report, setting: Setting, ids: Sequence[Sequence[int]]) -> bool:
    """Whether every decoder may have caches of its own."""
    decoders = len(decoder_names(report.plan, setting, report.simulated_acceptance is not None)) + _COPIES
    positions = max(map(len, ids)) + setting.new_tokens
    a_sequence: int = positions * sum(row["cache_bytes_per_token"] for row in report.models)
    a_sequence += _LAWS_OF_A_SEQUENCE * 4 * max(row["vocabulary"] for row in report.models)
    weights: int = sum(row["bytes"] for row in report.models)
    return weights <= _MOST_WEIGHTS and decoders * setting.batch * a_sequence <= _MOST_STATE


def run_benchmark(
    models: EFTModels,
    prompts: Sequence[Sequence[int]],
    report: Report,
    on_setting: Callable[[Setting], None],
    on_run: Callable[[], None],
    on_result: Callable[[], None],
    give_way: Callable[[], None] = lambda: None,
) -> None:
    """Measure the settings that the report does not have yet, and add them.

    Args:
        prompts: token ids.
        on_setting: called before a setting.
        on_run: called after each run, warm-ups included.
        on_result: called when the report has another result.
        give_way: called where nobody's clock runs, for another process to have its turn.
    """
    plan = report.plan
    device = models.runners().large.device
    for setting in missing_settings(report):
        on_setting(setting)
        ids = prompts if setting.context is None else with_context(prompts, setting.context)
        pausing = device.type == "cpu" and can_pause() and _fits_many_times(report, setting, ids)
        subject = (plan, setting, models, report.simulated_acceptance, pausing)
        comparison = compare(
            build_decoders(*subject),
            prompt_batches(ids, setting.batch, plan.runs(setting, len(prompts))),
            reference=NAIVE,
            copies=[build_decoders(*subject, [NAIVE])[NAIVE] for _ in range(_COPIES if pausing else 0)],
            seed=plan.seed,
            turn_seconds=_TURN_SECONDS if pausing else None,
            device=device,
            on_run=on_run,
            give_way=give_way,
            max_new_tokens=setting.new_tokens,
            top_k=0,
            # Every decoder makes the same number of tokens.
            eos_token_id=[],
            **sampling_options(setting.temperature),
        )
        report.results.append(Result(setting, comparison))
        on_result()
