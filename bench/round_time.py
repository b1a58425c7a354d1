"""What a round on a CPU spends outside the models' passes: `python -P -m speculative_eft.bench.round_time`.

The phases are those that `generate` times. Steps and draws alternate within a draft, so what the steps take
is found by drafting once more after each round, greedily, with no noise, memory or filter; what is left of a
draw then, the largest of the logits, counts to the steps. A pass of each model that scores follows, so that
the next draft finds others' weights in the processor's caches, as it would without all this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, EFTStats
from speculative_eft.decoding.running import Report, RunningBatch
from speculative_eft.models import EFTModels, EFTRunners, Runner
from speculative_eft.models.costs import bind_plain_draft
from speculative_eft.models.demo import held_out_prompts

from .comparison import Spread
from .machine import Environment, save, show
from .prompts import PromptBatch, prompt_batches
from .report import environment_line

__all__ = ["PASSES", "RoundTime", "load", "round_time", "table"]

PASSES = ("steps of the draft", "large base", "small models")
"""Parts of a round that are passes; `RoundTime.milliseconds` has the others too."""

_SETTINGS = ((1.0, 1, 4), (0.0, 1, 6), (1.0, 16, 1))
"""Temperature, batch and draft length."""
_NEW_TOKENS = 96
_ADVANCE = RunningBatch.advance


@dataclass(frozen=True)
class RoundTime:
    """Rounds of one draft length, over runs of a batch of prompts each.

    Attributes:
        milliseconds: of a round, by part: medians over runs.
        outside: the share of a round that no pass takes, over runs.
        tokens_per_round: new tokens a sequence gains a round.
    """

    temperature: float
    batch: int
    draft_tokens: int
    milliseconds: dict[str, float]
    outside: Spread
    tokens_per_round: float


class _Steps:
    """Makes a draft's steps again after each round, and notes what they take."""

    def __init__(self, runners: EFTRunners, batch: int, drafted: int) -> None:
        self.seconds = self.spent = 0.0
        self._runners, self._drafted = runners, drafted
        self._draft_lens = torch.full((batch,), drafted)
        self._done = torch.zeros(batch, dtype=torch.bool)
        self._counts = torch.zeros(batch, dtype=torch.int64)
        self._passes: list[Callable[[], object]] = []

    def advance_of(self) -> Callable[..., Report | None]:
        """`RunningBatch.advance`, after which the sequences that took part pass again."""

        def advance(running: RunningBatch, *arguments: Any, **options: Any) -> Report | None:
            report = _ADVANCE(running, *arguments, **options)
            begun = perf_counter()
            self._again()
            # Who takes part in the next round: looked up before that, it would count to the next draft.
            self._done.copy_(running.state.done)
            self.spent += perf_counter() - begun
            return report

        return advance

    def _again(self) -> None:
        drafters = self._runners.drafters
        (drafting,) = drafters or self._runners.tuned
        if not self._passes:
            # Only now do the caches have their places.
            runners = [self._runners.large, *(self._runners.tuned if drafters else []), self._runners.base]
            scoring = [_bound(runner, self._counts, self._drafted + 1) for runner in runners]
            draft = bind_plain_draft(
                drafting, self._draft_lens, self._done, self._counts, self._drafted, 0.0, bool(drafters)
            )
            self._passes = [_found(draft), *scoring]
        steps, *scoring = self._passes
        before = drafting.lengths.clone()
        begun = perf_counter()
        steps()
        self.seconds += perf_counter() - begun
        drafting.lengths.copy_(before)
        for call in scoring:
            call()


def _bound(runner: Runner, counts: Tensor, rows: int) -> Callable[[], object]:
    batch = counts.shape[0]
    block = torch.zeros(batch, rows, dtype=torch.int64)
    return _found(runner.bind(block, counts, torch.empty(batch, rows, runner.vocab_size)))


def _found(call: Callable[[], object] | None) -> Callable[[], object]:
    if call is None:
        raise ValueError(
            "the rounds of these models are not bound: that takes Numba, and models like Llama on a CPU"
        )
    return call


def round_time(
    models: EFTModels, prompts: list[PromptBatch], temperature: float, draft_tokens: int, new_tokens: int
) -> RoundTime:
    """Time the rounds of speculative EFT, block rule, on each of `prompts`, after a run to warm up."""
    batch = prompts[0].input_ids.shape[0]
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=draft_tokens, expected_batch=batch))
    runs, gains = [], []
    for seed, prompt in enumerate([prompts[0], *prompts]):
        steps = _Steps(decoder.runners, batch, draft_tokens)
        with mock.patch.object(RunningBatch, "advance", steps.advance_of()):
            output = decoder.generate(
                prompt.input_ids, prompt.attention_mask, max_new_tokens=new_tokens, do_sample=True,
                temperature=temperature, top_k=0, eos_token_id=[], seed=seed, return_dict_in_generate=True,
                trace=False,
            )  # fmt: skip
        assert isinstance(output, EFTOutput) and output.stats is not None
        runs.append(_parts(output.stats, steps))
        gains.append(output.stats.emitted_tokens / output.stats.sequence_rounds)
    del runs[0], gains[0]
    return RoundTime(
        temperature=temperature,
        batch=batch,
        draft_tokens=draft_tokens,
        milliseconds={part: 1000 * Spread.of([run[part] for run in runs]).median for part in runs[0]},
        outside=Spread.of([1 - sum(run[part] for part in PASSES) / sum(run.values()) for run in runs]),
        tokens_per_round=fmean(gains),
    )


def _parts(stats: EFTStats, steps: _Steps) -> dict[str, float]:
    """Seconds of a round by part."""
    rounds, spent = stats.rounds, stats.seconds
    own = steps.seconds / rounds
    return {
        PASSES[0]: own,
        PASSES[1]: spent["large"] / rounds,
        PASSES[2]: spent["base"] / rounds,
        "draws of the draft": spent["draft"] / rounds - own,
        "verify, remember, commit": spent["verify"] / rounds,
        "everything else": (spent["other"] - steps.spent) / rounds,
    }


def table(times: Sequence[RoundTime]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of a table with a column for each of `times`."""
    heads = ["", *(f"T={time.temperature:g}, batch {time.batch}, K={time.draft_tokens}" for time in times)]
    rows = [[part, *(f"{time.milliseconds[part]:.2f}" for time in times)] for part in times[0].milliseconds]
    whole = [sum(time.milliseconds.values()) for time in times]
    rows.append(["round, milliseconds", *(f"{milliseconds:.2f}" for milliseconds in whole)])
    rows.append(["tokens a round and sequence", *(f"{time.tokens_per_round:.2f}" for time in times)])
    shares = [
        (time.outside.median, time.outside.lower_quartile, time.outside.upper_quartile) for time in times
    ]
    rows.append(["outside the passes", *("{:.1%} [{:.1%}, {:.1%}]".format(*share) for share in shares)])
    return heads, rows


def load(path: Path) -> tuple[str, list[RoundTime]]:
    """The machine's line and the times of what `main` wrote."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    times = [RoundTime(**row | {"outside": Spread(**row["outside"])}) for row in saved["rounds"]]
    # As `EFTModels.demo` has them.
    line = environment_line(Environment(**saved["environment"]), "float32", saved["commit"])
    return f"{line}; {saved['new_tokens']} new tokens", times


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
    runs: Annotated[int, typer.Option(help="Of each setting; of batches a quarter.")] = 16,
) -> None:
    """Time the bundled trio's rounds, and print a table."""
    models = EFTModels.demo()
    assert models.tokenizer is not None
    ids = [models.tokenizer(prompt).input_ids for prompt in held_out_prompts()]
    times = []
    for temperature, batch, draft_tokens in _SETTINGS:
        prompts = prompt_batches(ids, batch, runs if batch == 1 else -(-runs // 4))
        times.append(round_time(models, prompts, temperature, draft_tokens, _NEW_TOKENS))
    rounds = [asdict(time) for time in times]
    show(*table(times))
    save(json_path, new_tokens=_NEW_TOKENS, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
