"""Times whole rounds against what they are to beat: `python -P -m speculative_eft.bench.engine --json FILE`.

Random weights at the shapes of published trios, with caches that hold random keys and values and an
acceptance that is set ("simulated": each drafted token is accepted with one chance, whatever came before it),
and the demo trio with the acceptance that it has. The decoders take turns on the same runners; ratios are of
runs of the same turn.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speculative_eft.decoding import DraftWeights, EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.decoding.draft_length import LONGEST_DRAFT
from speculative_eft.decoding.round import PhaseTimer, commit_phase, draft_phase, score_by_small
from speculative_eft.decoding.running import rounded_span
from speculative_eft.kernels import side_by_side, verify
from speculative_eft.models import EFTModels, EFTRunners, ModelRunner, check_caches
from speculative_eft.models.demo import held_out_prompts
from speculative_eft.models.memory import free_bytes

from .baselines import SingleModelDecoder
from .comparison import Spread
from .plan import NAIVE
from .script import DTYPE, LeftOut, Script, run
from .shapes import (
    LLAMA,
    QWEN,
    TINY,
    TrioShape,
    fill_with_noise,
    random_trio,
    step_bytes,
    weight_bytes,
)
from .timing import time_operation
from .windows import (
    PlainLoop,
    RoundDecoder,
    Start,
    Window,
    begin,
    forced_acceptance,
    run_window,
    warm_up_rounds,
)

__all__ = ["ALONE", "PLAIN", "measure", "roofline_bytes"]

_EFT: dict[DraftWeights, str] = {"own": "EFT", "int8": "EFT, drafts of 8 bits"}
_BY_COST_MODEL = tuple(f"{name}, K by the cost model" for name in _EFT.values())
"""The decoders whose draft lengths the cost model chooses: by the models' own weights, and by copies."""
_TOP_K = "EFT, top_k=50"
"""EFT that samples as transformers does by default; all other decoders have no filter."""
ALONE, PLAIN = "large model alone", "plain transformers loop"
_HOST_MICROSECONDS, _OF_ROOFLINE = 100.0, 1.2
_OVER = {NAIVE: 3.0, ALONE: 2.5, PLAIN: 8.0}
"""How many times as fast EFT is to be at an acceptance of 0.9."""


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        acceptances: simulated chances.
        draft_lens: fixed ones, beside the one of the cost model.
        rounds, plain_steps: of a window, for each batch.
        turns: windows of each decoder and acceptance.
        demo_tokens: new tokens a sequence of the demo trio.
    """

    trios: tuple[TrioShape, ...]
    contexts: tuple[int, ...]
    acceptances: tuple[float, ...]
    draft_lens: tuple[int, ...]
    rounds: Mapping[int, int]
    plain_steps: Mapping[int, int]
    turns: int
    demo_tokens: int


_ROUNDS, _PLAIN_STEPS = {1: 24, 4: 12, 16: 12}, {1: 3, 4: 2, 16: 2}
_WHOLE = Sweep((LLAMA, QWEN), (1024, 8192), (0.7, 0.9), (4, 8, 12), _ROUNDS, _PLAIN_STEPS, 3, 96)
_QUICK = Sweep((LLAMA,), (1024,), (0.9,), (8,), {1: 24}, {1: 3}, 3, 96)
_SMOKE = Sweep((TINY,), (40,), (0.9,), (3,), {2: 6}, {2: 2}, 2, 8)


@dataclass
class _Contest:
    """Decoders that take turns.

    Attributes:
        decoders: by name, all on the runners of `start`.
        peak_bytes: of memory while they were warmed up; None on a CPU.
        windows: of each decoder, by the labels of a row and in the order of the turns.
    """

    script: Script
    sweep: Sweep
    start: Start
    labels: dict[str, Any]
    decoders: dict[str, RoundDecoder]
    plain: PlainLoop | None
    peak_bytes: int | None
    windows: dict[tuple[str, float | None], list[Window]] = field(default_factory=dict)

    def turn(self, seed: int, acceptance: float | None, rounds: int | None) -> None:
        """Let every decoder run one window."""
        for name, decoder in self.decoders.items():
            window = run_window(decoder, self.start, seed, rounds, _filters(name))
            self.windows.setdefault((name, acceptance), []).append(window)
        if self.plain is not None:
            window = _plain_window(self.plain, self.start, self.sweep.plain_steps[self.labels["batch"]])
            self.windows.setdefault((PLAIN, acceptance), []).append(window)


def roofline_bytes(
    models: EFTModels, drafted: float, tokens: float, alone: bool = False, eight_bits: bool = False
) -> float:
    """Bytes of weights and caches that a round reads.

    Args:
        drafted: tokens drafted a sequence; the tuned models step once more, the others once.
        tokens: in all sequences together.
        alone: whether the large model runs alone.
        eight_bits: whether copies of eight bits draft, and the tuned models step once.
    """
    large = step_bytes(models.large_base).of(tokens)
    if alone:
        return large
    tuned = sum(step_bytes(model).of(tokens) for model in models.small_tuned)
    draft = (drafted + 1) * tuned
    if eight_bits:
        draft = tuned + drafted * sum(step_bytes(model, 1).of(tokens) for model in models.small_tuned)
    return large + draft + step_bytes(models.small_base).of(tokens)


def measure(script: Script) -> None:
    """Time rounds of EFT, naive EFT, the large model alone and a plain loop of transformers."""
    sweep = _SMOKE if not script.on_gpu else _QUICK if script.quick else _WHOLE
    script.note(
        "Simulated: random weights, and each drafted token accepted with the stated chance. Block "
        "verification runs in full, but what it gains over that chance is not in the figures."
    )
    # What has bars first.
    for batch in sweep.rounds:
        _guarded(script, {"trio": "demo", "batch": batch}, partial(_measure_demo, script, sweep, batch))
        for shape in sweep.trios:
            labels = {"trio": shape.name, "batch": batch}
            _guarded(script, labels, partial(_measure_trio, script, sweep, shape, batch))
    script.write()


def _guarded(script: Script, labels: dict[str, Any], step: Callable[[], None]) -> None:
    """Run a step; what is left out or fails is a row that says so."""
    reason = script.attempt(step)
    if reason:
        script.content["rows"].append({**labels, **reason})
        script.write()
    gc.collect()
    script.release()


def _measure_trio(script: Script, sweep: Sweep, shape: TrioShape, batch: int) -> None:
    needed, free = weight_bytes(shape, DTYPE), free_bytes(script.device)
    if free is not None and needed > free:
        raise LeftOut(f"its weights of {needed / 2**30:.1f} GiB do not fit the {free / 2**30:.1f} GiB free")
    models = random_trio(shape, DTYPE, script.device)
    for context in sweep.contexts:
        labels = {"trio": shape.name, "context": context, "batch": batch}
        _guarded(script, labels, partial(_measure_shape, script, sweep, models, labels))


def _measure_shape(script: Script, sweep: Sweep, models: EFTModels, labels: dict[str, Any]) -> None:
    batch, context, device = labels["batch"], labels["context"], script.device
    # The same models with caches of their own, of which none is reserved yet.
    models = EFTModels(models.large_base, models.small_tuned, models.small_base)
    _measure_costs(models, batch)
    # All tokens of a window's rounds and of the warm-up.
    limit = (sweep.rounds[batch] + 3) * 17
    start = Start(
        models,
        last_token=torch.arange(batch, device=device) + 3,
        lengths=torch.full((batch,), context, dtype=torch.int64, device=device),
        longest=context,
        limit=limit,
    )
    _fill_with_noise(models.runners(), batch, context + limit + 18)
    chance = torch.zeros(1, device=device)
    decoders = _decoders(models, sweep.draft_lens, batch)
    with forced_acceptance(chance):
        peak_bytes = _warm_up(script, decoders, start, sweep.acceptances, narrowing=False)
        plain = _plain_loop(script, models, labels, start)
        contest = _Contest(script, sweep, start, labels, decoders, plain, peak_bytes)
        for acceptance in sweep.acceptances:
            if monotonic() > script.deadline:
                script.content["rows"].append(
                    {**labels, "acceptance": acceptance, "left_out": "no time left"}
                )
                continue
            chance.fill_(acceptance)
            for turn in range(sweep.turns):
                contest.turn(turn, acceptance, sweep.rounds[batch])
            for name in decoders:
                if name not in (NAIVE, ALONE):
                    _add_row(contest, name, acceptance)
    for name in _references(contest):
        _add_row(contest, name, None)
    if contest.windows and (batch == 1 or not script.on_gpu):
        _add_bars(contest, max(sweep.acceptances))
    contest.plain = plain = None
    fixed = decoders[f"{_EFT['own']}, K={_middle(sweep.draft_lens)}"]
    _add_profile(script, fixed, start, labels)


def _measure_demo(script: Script, sweep: Sweep, batch: int) -> None:
    models = EFTModels.demo()
    for model in (models.large_base, *models.small_tuned, models.small_base):
        model.to(script.device)  # type: ignore[arg-type]
    assert models.tokenizer is not None
    _measure_costs(models, batch)
    prompts = [models.tokenizer(prompt).input_ids for prompt in held_out_prompts()[:batch]]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    tokens, lengths = tokens.to(script.device), lengths.to(script.device)
    for runner in models.runners().every:
        # The tokens, a round that was begun before they were known to be the last, and the last one's bonus.
        runner.reserve(batch, longest + sweep.demo_tokens + 18)
        runner.prefill(tokens[:, :-1], lengths - 1)
    last_token = tokens.gather(1, (lengths - 1)[:, None])[:, 0]
    start = Start(models, last_token, lengths, longest, sweep.demo_tokens)
    decoders = _decoders(models, sweep.draft_lens, batch)
    labels = {"trio": "demo", "context": round(float(lengths.float().mean())), "batch": batch}
    peak_bytes = _warm_up(script, decoders, start, (), narrowing=script.on_gpu)
    contest = _Contest(script, sweep, start, labels, decoders, None, peak_bytes)
    for turn in range(sweep.turns):
        contest.turn(turn, None, None)
    for name in decoders:
        _add_row(contest, name, None)


def _draft_weights(batch: int) -> tuple[DraftWeights, ...]:
    # Copies of eight bits are for one sequence.
    return ("own", "int8") if batch == 1 else ("own",)


def _measure_costs(models: EFTModels, batch: int) -> None:
    """For the cost model; it empties the caches, so before they are filled."""
    for weights in _draft_weights(batch):
        models.step_costs(False, batch, weights == "int8")


def _decoders(models: EFTModels, draft_lens: Sequence[int], batch: int) -> dict[str, RoundDecoder]:
    decoders: dict[str, RoundDecoder] = {}
    for weights, by_cost_model in zip(_draft_weights(batch), _BY_COST_MODEL, strict=False):
        lengths: dict[str, Any] = {by_cost_model: "auto"}
        lengths |= {f"{_EFT[weights]}, K={drafted}": drafted for drafted in draft_lens}
        for name, drafted in lengths.items():
            config = EFTConfig(draft_tokens=drafted, draft_weights=weights, expected_batch=batch)
            decoders[name] = EFTDecoder(models, config)
    if batch == 1:
        drafted = _middle(draft_lens)
        config = EFTConfig(draft_tokens=drafted, draft_weights="own")
        decoders[f"{_TOP_K}, K={drafted}"] = EFTDecoder(models, config)
    return {**decoders, NAIVE: NaiveEFTDecoder(models), ALONE: SingleModelDecoder(models)}


def _middle(draft_lens: Sequence[int]) -> int:
    """The draft length that stands for all fixed ones."""
    return draft_lens[min(1, len(draft_lens) - 1)]


def _filters(name: str) -> tuple[str, ...]:
    """Those that a decoder samples with, for `filtered`."""
    return ("top_k",) if name.startswith(_TOP_K) else ()


def _expected_lengths(decoder: RoundDecoder, acceptances: Sequence[float]) -> list[int]:
    """The drafts that rounds will ask for: all, or those of running acceptances around those simulated."""
    policy = decoder.policy if isinstance(decoder, EFTDecoder) else None
    if policy is None:
        return [decoder.longest_draft]
    prior = policy.prior_accepted(ends_early=False, greedy=False)
    if prior == -math.inf:
        return [0]
    if not acceptances:
        return list(range(LONGEST_DRAFT + 1))
    running = torch.linspace(min(acceptances) - 0.15, min(max(acceptances) + 0.06, 1.0), 200)
    # Many tests, so that the prior weighs little.
    rule, tested = policy.rule(torch.device("cpu")), torch.full((200,), 1e6)
    lengths = rule.draft_lens(1e6 * running, tested, torch.full((200,), prior))
    return sorted(set(lengths.tolist()))


def _warm_up(
    script: Script,
    decoders: dict[str, RoundDecoder],
    start: Start,
    acceptances: Sequence[float],
    *,
    narrowing: bool,
) -> int | None:
    """Compile and capture what the windows will run; the most bytes that were allocated meanwhile."""
    if script.on_gpu:
        torch.cuda.reset_peak_memory_stats(script.device)
    for name, decoder in decoders.items():
        lengths = _expected_lengths(decoder, acceptances)
        warm_up_rounds(decoder, start, lengths, _filters(name), narrowing=narrowing)
    return torch.cuda.max_memory_allocated(script.device) if script.on_gpu else None


@torch.inference_mode()
def _fill_with_noise(runners: EFTRunners, batch: int, length: int) -> None:
    every = runners.every
    try:
        check_caches(every, batch, [length] * len(every), 0, 0, "batch and context")
    except ValueError as error:
        raise LeftOut(str(error)) from error
    for runner in every:
        assert isinstance(runner, ModelRunner)
        fill_with_noise(runner, batch, length)


def _plain_loop(script: Script, models: EFTModels, labels: dict[str, Any], start: Start) -> PlainLoop | None:
    """The plain loop with filled caches, or None and a row that says why."""
    plain = PlainLoop(models)
    try:
        plain.start(start.last_token.shape[0], start.longest)
        plain.run(start.last_token, 2)
        return plain
    except torch.OutOfMemoryError:
        plain.caches = []
    script.release()
    reason = "its caches do not fit the memory beside the others'"
    script.content["rows"].append({**labels, "decoder": PLAIN, "left_out": reason})
    script.write()
    return None


def _plain_window(plain: PlainLoop, start: Start, steps: int) -> Window:
    begun = perf_counter()
    # Reading the token waits for the device.
    plain.run(start.last_token, steps).tolist()
    seconds = perf_counter() - begun
    tokens = steps * start.last_token.shape[0]
    return Window(seconds, seconds, 0.0, (0,) * steps, tokens, 0, 0)


def _add_row(contest: _Contest, name: str, acceptance: float | None) -> None:
    """A row of one decoder, at one simulated acceptance, or over all windows where it makes no difference."""
    script, decoder = contest.script, contest.decoders.get(name)
    captured = None if decoder is None else decoder.captured
    windows = _windows(contest, name, acceptance)
    simulated = contest.labels["trio"] != "demo"
    round_seconds = Spread.of([window.round_seconds for window in windows])
    rounds = sum(len(window.drafted) for window in windows)
    tested = sum(window.tested for window in windows)
    floor = _roofline_seconds(contest, name, windows)
    row: dict[str, Any] = {
        **contest.labels,
        "decoder": name,
        "acceptance": (acceptance if simulated else "its own"),
        "kind": "simulated" if simulated else "measured",
        "tokens_per_second": asdict(Spread.of([window.tokens_per_second for window in windows])),
        "tokens_per_round": sum(window.tokens for window in windows) / rounds / contest.labels["batch"],
        "mean_drafted": sum(sum(window.drafted) for window in windows) / rounds,
        "accepted_share": sum(window.accepted for window in windows) / tested if tested else None,
        "round_milliseconds": {key: 1e3 * value for key, value in asdict(round_seconds).items()},
        "host_microseconds": 1e6 * sum(window.host_seconds for window in windows) / rounds,
        "waited_microseconds": 1e6 * sum(window.waited for window in windows) / rounds,
        "roofline_milliseconds": 1e3 * floor,
        "times_roofline": round_seconds.median / floor,
        "windows": len(windows),
        "rounds_a_window": len(windows[0].drafted),
        "graph_bytes": None if captured is None else captured.graphs.used,
        # Rounds beyond the budget of graphs run without one.
        "within_graph_budget": captured is not None and captured.graphs.used < captured.graphs.budget,
        # Of the models, their caches, and the states and graphs of all decoders but the plain loop.
        "peak_bytes": contest.peak_bytes,
    }
    if name not in (NAIVE, ALONE, PLAIN):
        row["times"] = {
            other: asdict(_ratio(windows, _windows(contest, other, acceptance)))
            for other in _references(contest)
        }
        row["times_at_the_roofline"] = {
            other: _ratio_at_the_roofline(contest, name, other, acceptance)
            for other in _references(contest)
            if other != PLAIN
        }
    script.content["rows"].append(row)
    script.write()


def _windows(contest: _Contest, name: str, acceptance: float | None) -> list[Window]:
    """A decoder's windows at one acceptance, or at all of them."""
    return [
        window
        for (owner, own), windows in contest.windows.items()
        if owner == name and acceptance in (None, own)
        for window in windows
    ]


def _references(contest: _Contest) -> list[str]:
    return [name for name in (NAIVE, ALONE, PLAIN) if any(owner == name for owner, _ in contest.windows)]


def _ratio(own: Sequence[Window], others: Sequence[Window]) -> Spread:
    pairs = zip(own, others, strict=True)
    return Spread.of([window.tokens_per_second / other.tokens_per_second for window, other in pairs])


def _roofline_seconds(contest: _Contest, name: str, windows: Sequence[Window]) -> float:
    """Of a mean round: the bytes that it reads at the speed of a copy."""
    start = contest.start
    drafted = sum(sum(window.drafted) for window in windows) / sum(len(window.drafted) for window in windows)
    gained = sum(window.tokens for window in windows) / len(windows) / 2
    tokens = float(start.lengths.sum()) + gained
    needed = roofline_bytes(start.models, drafted, tokens, name == ALONE, name.startswith(_EFT["int8"]))
    return needed / contest.script.bandwidth


def _ratio_at_the_roofline(contest: _Contest, name: str, other: str, acceptance: float | None) -> float:
    """How many times as fast a decoder were than another if both took what their bytes take."""

    def tokens_per_second(of: str) -> float:
        windows = _windows(contest, of, acceptance)
        rounds = sum(len(window.drafted) for window in windows)
        tokens = sum(window.tokens for window in windows)
        return tokens / rounds / _roofline_seconds(contest, of, windows)

    return tokens_per_second(name) / tokens_per_second(other)


def _add_bars(contest: _Contest, acceptance: float) -> None:
    """The bars of a shape, each over all EFT decoders without filters: worst times and best ratios."""
    script, labels = contest.script, contest.labels
    at = f"{labels['trio']}, context {labels['context']}, batch {labels['batch']}"
    rows = [
        row
        for row in script.content["rows"]
        if labels.items() <= row.items() and row.get("decoder", "").startswith("EFT") and "times" in row
        # The others have no filter.
        if not row["decoder"].startswith(_TOP_K)
    ]
    host = max(row["host_microseconds"] for row in rows)
    script.bar(f"host under {_HOST_MICROSECONDS:.0f} us a round: {at}", host, host < _HOST_MICROSECONDS)
    waited = min(row["waited_microseconds"] for row in rows)
    script.bar(f"host hidden, so that it waits for the device (us a round): {at}", waited, waited > 0)
    slowest = max(row["times_roofline"] for row in rows)
    script.bar(f"round at most {_OF_ROOFLINE} times the roofline: {at}", slowest, slowest <= _OF_ROOFLINE)
    for other, least in _OVER.items():
        bar = f"at least {least} times {other} at a simulated acceptance of {acceptance}: {at}"
        there = [row for row in rows if row["acceptance"] == acceptance and other in row["times"]]
        best = max(there, key=lambda row: float(row["times"][other]["median"]), default=None)
        measured = None if best is None else best["times"][other]["median"]
        script.bar(bar, measured, (measured or 0) >= least)
        if best is not None:
            script.content["bars"][-1]["decoder"] = best["decoder"]
        if best is not None and other in best["times_at_the_roofline"]:
            # The most that could have been measured.
            script.content["bars"][-1]["at_the_roofline"] = best["times_at_the_roofline"][other]
            script.write()


@torch.inference_mode()
def _add_profile(script: Script, decoder: RoundDecoder, start: Start, labels: dict[str, Any]) -> None:
    """A row with what each phase of a round takes, each captured on its own and begun with a cold cache."""
    row: dict[str, Any] = {**labels, "decoder": "EFT, phases", "drafted": decoder.longest_draft}
    row["phase_microseconds"] = phases = {}
    for phase, operation in _phases(decoder, start).items():
        timing = time_operation(operation, script.device, cold=True)
        phases[phase] = asdict(timing.microseconds)
        row["method"] = timing.method
    script.content["rows"].append(row)
    script.write()


def _phases(decoder: RoundDecoder, start: Start) -> dict[str, Callable[[], object]]:
    """The phases of a round from the start, each of which can be repeated."""
    running = begin(decoder, start, 0)
    runners, state, plan = running.runners, running.state, running.plan
    drafted = decoder.longest_draft
    span = rounded_span(start.longest + drafted + 1)
    before = start.lengths - 1

    def draft() -> Any:
        for runner in runners.tuned:
            runner.lengths.copy_(before)
        return draft_phase(runners, state, plan, drafted, span)

    drafts = draft()
    block = torch.cat([start.last_token[:, None], drafts.tokens], dim=1)

    def by_large() -> torch.Tensor:
        return runners.large.forward(block, span)

    def by_small() -> list[torch.Tensor]:
        for runner in runners.tuned:
            runner.lengths.copy_(before + drafted)
        return score_by_small(runners, drafts, block, span, PhaseTimer())

    large, (*tuned, base) = by_large(), by_small()

    def check() -> Any:
        return verify(
            large, tuned, base, drafts.tokens, state.draft_lens, plan.coefficients, plan.sampling,
            plan.draft_sampling, state.noise, plan.acceptance, plan.vocab_size, drafts.correction, False,
        )  # fmt: skip

    verdict = check()

    def commit() -> None:
        logits = [large, base, *tuned]
        commit_phase(runners, state, plan, block, drafts.tokens, verdict, logits, PhaseTimer(), None)
        # Repeated commits would leave the output and the caches.
        state.generated.zero_()
        for runner in runners.every:
            runner.lengths.copy_(before)

    return {
        "draft": draft,
        "score, large": by_large,
        "score, small": by_small,
        "score, side by side": lambda: side_by_side(block.device, by_large, by_small),
        "verify": check,
        "commit": commit,
    }


def show(script: Script) -> None:
    """Print a line for each row, and the bars."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    titles = ("trio", "context", "batch", "decoder", "acceptance", "drafted")
    table = Table(*titles)
    for title in ("tokens/s", "ms a round", "host us", "x roofline", "x naive", "x alone", "x plain"):
        table.add_column(title, justify="right")
    for row in script.content["rows"]:
        cells = [str(row.get(title, "")) for title in titles[:-1]]
        if "round_milliseconds" in row:
            cells += [
                f"{row['mean_drafted']:.1f}",
                f"{row['tokens_per_second']['median']:.1f}",
                f"{row['round_milliseconds']['median']:.2f}",
                f"{row['host_microseconds']:.0f}",
                f"{row['times_roofline']:.2f}",
            ]
            times = row.get("times", {})
            cells += [f"{times[other]['median']:.2f}" if other in times else "" for other in _OVER]
        elif "phase_microseconds" in row:
            phases = row["phase_microseconds"].items()
            cells[4] = ", ".join(f"{name} {spread['median']:.0f} us" for name, spread in phases)
        else:
            cells[3] = " ".join([cells[3], row.get("left_out") or row["failed"]]).strip()
        table.add_row(*cells)
    console.print(table)
    script.show_bars(console)


def main() -> None:
    """See `measure`."""
    run("engine", measure, show, 840.0)


if __name__ == "__main__":
    main()
