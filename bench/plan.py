"""What a benchmark measures: its settings, and the decoders that meet in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.kernels import AcceptanceRule
from speculative_eft.models import EFTModels, EFTRunners, StepCosts

from .baselines import AssistedDecoder, SingleModelDecoder, TransformersLoop, ordinary_speculation
from .comparison import Decoder
from .simulation import forced_runners

__all__ = [
    "AGAIN",
    "ASSISTED",
    "BASELINES",
    "LARGE",
    "LOOP",
    "NAIVE",
    "SPECULATION",
    "TUNED",
    "DraftTokens",
    "Plan",
    "Setting",
    "build_decoders",
    "decoder_names",
    "eft_name",
]

DraftTokens = int | Literal["auto"]

NAIVE = "naive EFT"
LOOP = "naive EFT, transformers loop"
LARGE = "large alone"
TUNED = "tuned alone"
SPECULATION = "large, drafts by small base"
ASSISTED = "large, transformers assisted"
BASELINES = (NAIVE, LOOP, LARGE, TUNED, SPECULATION, ASSISTED)
AGAIN = " (again)"
"""Ends the name of a decoder's twin, which is measured to tell what the noise is."""

_SWEPT = {
    "context": "contexts",
    "new_tokens": "lengths",
    "alpha": "alphas",
    "beta": "betas",
    "conservative_top_p": "conservative_top_ps",
}


@dataclass(frozen=True)
class Setting:
    """One place of the plan.

    Attributes:
        context: tokens of each prompt; None for prompts as they are.
        new_tokens: generated for each sequence, exactly.
        varied: the field in which this setting differs from the plan's first values; None in the grid of
            temperatures and batches.
    """

    temperature: float
    batch: int
    context: int | None
    new_tokens: int
    alpha: float
    beta: float
    conservative_top_p: float | None
    varied: str | None = None

    @property
    def label(self) -> str:
        """Names the setting in tables; no other setting of a plan has it."""
        label = f"T={self.temperature:g}, batch {self.batch}"
        if self.varied is None:
            return label
        value = getattr(self, self.varied)
        return f"{label}, {self.varied} {'off' if value is None else format(value, 'g')}"


@dataclass(frozen=True)
class Plan:
    """What is measured. The first value of each tuple is the one at which the others are varied.

    Temperatures and batches meet each other with every baseline; contexts, lengths, alphas, betas and
    conservative_top_ps are varied one at a time, at the first batch and each temperature. Draft lengths and
    rules are compared at the first batch; at temperature 0 all rules are one.

    Attributes:
        repeats: runs on each batch of prompts in the grid.
        least_runs: of each decoder in any setting; in a sweep also the most.
        seed: of the first turn of each setting.
    """

    temperatures: tuple[float, ...]
    batches: tuple[int, ...]
    contexts: tuple[int | None, ...]
    lengths: tuple[int, ...]
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    conservative_top_ps: tuple[float | None, ...]
    rules: tuple[AcceptanceRule, ...]
    draft_tokens: tuple[DraftTokens, ...]
    repeats: int
    least_runs: int
    seed: int

    @property
    def chosen(self) -> str:
        """The decoder that is held against the baselines: the first rule, and "auto" where it is measured."""
        return eft_name(self.rules[0], "auto" if "auto" in self.draft_tokens else self.draft_tokens[0])

    def settings(self) -> list[Setting]:
        """All settings, the grid first."""
        first = Setting(
            temperature=self.temperatures[0],
            batch=self.batches[0],
            context=self.contexts[0],
            new_tokens=self.lengths[0],
            alpha=self.alphas[0],
            beta=self.betas[0],
            conservative_top_p=self.conservative_top_ps[0],
        )
        grid = [
            replace(first, temperature=temperature, batch=batch)
            for batch in self.batches
            for temperature in self.temperatures
        ]
        swept = [
            replace(first, temperature=temperature, varied=name, **{name: value})
            for name, values in _SWEPT.items()
            for value in getattr(self, values)[1:]
            for temperature in self.temperatures
        ]
        return grid + swept

    def runs(self, setting: Setting, prompts: int) -> int:
        """How often each decoder runs in a setting with so many prompts at hand."""
        if setting.varied is not None:
            return self.least_runs
        return max(self.least_runs, self.repeats * math.ceil(prompts / setting.batch))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON gives them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Plan:
        """The plan that `to_dict` made `saved` of."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
        }
        return cls(**values)


def eft_name(rule: AcceptanceRule, draft_tokens: DraftTokens) -> str:
    """What tables call speculative EFT."""
    return f"EFT, {rule} rule, K={draft_tokens}"


def _speculative(plan: Plan, setting: Setting) -> dict[str, tuple[AcceptanceRule, DraftTokens]]:
    """Rule and draft length of each speculative decoder of a setting."""
    every = {
        eft_name(rule, count): (rule, count)
        for rule in (plan.rules if setting.temperature > 0 else plan.rules[:1])
        for count in plan.draft_tokens
    }
    if setting.varied is not None:
        return {plan.chosen: every[plan.chosen]}
    if setting.batch == plan.batches[0]:
        return every
    shortest = [count for count in plan.draft_tokens if count != "auto"][:2]
    wanted = {plan.chosen, *(eft_name(plan.rules[0], count) for count in shortest)}
    return {name: value for name, value in every.items() if name in wanted}


def decoder_names(plan: Plan, setting: Setting, simulated: bool) -> list[str]:
    """The decoders that meet in a setting, in the order of its first turn.

    transformers' assisted generation takes one sequence at a time, and does not know of forced acceptance;
    the loop over transformers has no conservative filter.
    """
    speculative = list(_speculative(plan, setting))
    if setting.varied is not None:
        return [NAIVE, LARGE, *speculative]
    left_out = set()
    if setting.batch > 1 or simulated:
        left_out.add(ASSISTED)
    if setting.conservative_top_p is not None:
        left_out.add(LOOP)
    baselines = [name for name in BASELINES if name not in left_out]
    if setting.batch == plan.batches[0]:
        baselines += [f"{SPECULATION}, K={count}" for count in plan.draft_tokens if count in (2, 4)]
    return [*baselines, *speculative, plan.chosen + AGAIN]


def build_decoders(
    plan: Plan,
    setting: Setting,
    models: EFTModels,
    simulated_acceptance: float | None,
    own_caches: bool = False,
    names: Sequence[str] | None = None,
) -> dict[str, Decoder]:
    """The decoders of these names, of `decoder_names` unless given.

    With caches of their own, several can be in the middle of a run.
    """
    sizes = [
        sum(parameter.numel() for parameter in model.parameters())
        for model in (models.large_base, *models.small_tuned, models.small_base)
    ]
    shared: dict[str, Any] = {
        "alpha": setting.alpha,
        "beta": setting.beta,
        "conservative_top_p": setting.conservative_top_p,
    }
    quantised = False
    if simulated_acceptance is not None:
        # As decoders do that are given models.
        quantised = setting.batch == 1 and models.drafts_faster_quantised(pair=False)
        # Random logits have nothing to remember, and bare runners do not know their sizes.
        costs = StepCosts(sum(sizes[1:-1]) / sizes[0], 0.0)
        bytes_of_others = models.large_base.dtype.itemsize if quantised else 1
        shared |= {"remembered": 0, "cost_ratio": costs.cost_ratio / bytes_of_others}
    else:
        costs = models.step_costs(pair=False, batch=setting.batch)
        shared |= {"expected_batch": setting.batch}
    speculative = _speculative(plan, setting)

    def build(name: str) -> Decoder:
        if name == LOOP:
            return TransformersLoop(models, setting.alpha, setting.beta)
        if name == ASSISTED:
            return AssistedDecoder(models)
        own = models.with_own_caches() if own_caches else models
        subject: EFTModels | EFTRunners = own
        if simulated_acceptance is not None:
            is_speculative = name.removesuffix(AGAIN) in speculative
            drafters = own.quantised_drafters(pair=False) if quantised and is_speculative else []
            subject = forced_runners(own.runners(), simulated_acceptance, drafters)
        if name == NAIVE:
            return NaiveEFTDecoder(subject, EFTConfig(**shared))
        if name in (LARGE, TUNED):
            return SingleModelDecoder(subject, "large_base" if name == LARGE else "small_tuned")
        if name.startswith(SPECULATION):
            _, _, count = name.partition("K=")
            runners = subject.runners() if isinstance(subject, EFTModels) else subject
            return ordinary_speculation(runners, int(count) if count else "auto", costs, setting.batch)
        rule, draft_tokens = speculative[name.removesuffix(AGAIN)]
        return EFTDecoder(subject, EFTConfig(acceptance=rule, draft_tokens=draft_tokens, **shared))

    if names is None:
        names = decoder_names(plan, setting, simulated_acceptance is not None)
    return {name: build(name) for name in names}
