"""What `speculative-eft demo` shows: continuations with their sources, then decoders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from . import console_tables as tables
from .bench.baselines import SingleModelDecoder
from .bench.comparison import Comparison, Decoder, compare, sampling_options
from .bench.machine import environment
from .bench.plan import LARGE, NAIVE
from .bench.prompts import PromptBatch
from .command_options import tokenizer_of
from .console_text import LOOKS, has_colours, source_counts, styled_pieces
from .continuation import Continuation, continue_prompt
from .decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from .kernels import AcceptanceRule
from .models import EFTModels
from .models.extras import install_command

__all__ = ["show_demo"]

_COMPARED_RULES: tuple[AcceptanceRule, ...] = ("block", "token")
_MEANINGS = {
    "draft": "tokens that small_tuned drafted and the target accepted",
    "residual": "tokens the target drew in place of rejected ones",
    "bonus": "tokens the target drew after accepting a whole draft",
}


def show_demo(
    models: EFTModels,
    shown: Sequence[str],
    measured: Sequence[str],
    config: EFTConfig,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    repeats: int,
    out: Console,
    err: Console,
) -> dict[str, Any]:
    """Print continuations and measurements to `out`, progress to `err`; return all of it for JSON.

    Args:
        shown: prompts whose continuations are printed.
        measured: prompts on which the decoders are compared.
        config: of the speculative decoder; the table has the other rules of acceptance beside its own.
        temperature: of the continuations and the first table; a second table is greedy.
    """
    tokenizer = tokenizer_of(models)

    def ids(prompt: str) -> Tensor:
        found: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return found

    inputs = [ids(prompt) for prompt in measured]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "top_k": 0}
    rules = dict.fromkeys((config.acceptance, *_COMPARED_RULES))
    speculative = {
        f"EFT, {rule} rule": EFTDecoder(models, replace(config, acceptance=rule)) for rule in rules
    }
    chosen = next(iter(speculative))

    _introduce(models, out)
    continuations = []
    for index, prompt in enumerate(shown):
        continuation = continue_prompt(
            speculative[chosen], tokenizer, ids(prompt), seed + index, temperature, **options
        )
        _print_continuation(out, prompt, continuation)
        continuations.append({"prompt": prompt, "seed": seed + index, **continuation.to_dict()})

    plain: dict[str, Decoder] = {NAIVE: NaiveEFTDecoder(models), LARGE: SingleModelDecoder(models)}
    # Every rule is the same rule at temperature 0.
    turns = {
        value: plain | (speculative if value else {chosen: speculative[chosen]})
        for value in dict.fromkeys((temperature, 0.0))
    }
    comparisons = _measure(turns, inputs, repeats, seed, options, err)
    for label, comparison in comparisons.items():
        runs = "1 run" if repeats == 1 else f"{repeats} runs"
        title = f"{label}: {len(inputs)} prompts, {runs} each; medians over quartiles"
        out.print(tables.comparison_table(comparison, title))
        out.print(tables.phases_table(comparison))
    machine = environment()
    out.print(f"{machine.processor}; {machine.software}.")
    if machine.backend == "torch" and not machine.accelerators:
        # The command has brackets, which are no markup.
        out.print(
            f"Without Numba ({install_command('cpu')}) all of this runs several times slower.",
            markup=False,
            soft_wrap=True,
        )
    out.print(tables.verdict(comparisons, chosen, NAIVE, LARGE), style="bold", soft_wrap=True)
    return {
        "environment": asdict(machine),
        "models": [row.to_dict() for row in models.describe()],
        "continuations": continuations,
        "comparisons": {label: comparison.to_dict() for label, comparison in comparisons.items()},
    }


def _measure(
    turns: dict[float, dict[str, Decoder]],
    inputs: Sequence[Tensor],
    repeats: int,
    seed: int,
    options: dict[str, Any],
    err: Console,
) -> dict[str, Comparison]:
    """One comparison a temperature."""
    runs = sum(map(len, turns.values())) * (repeats * len(inputs) + 1)
    comparisons = {}
    with tables.progress_bar(err) as progress:
        task = progress.add_task("Measuring", total=runs)
        for temperature, decoders in turns.items():
            label = f"T={temperature:g}"
            tables.announce(progress, task, f"Measuring at {label}", f": {', '.join(decoders)}")
            comparisons[label] = compare(
                decoders,
                [PromptBatch(ids) for ids in inputs] * repeats,
                reference=NAIVE,
                seed=seed,
                on_run=lambda: progress.advance(task),
                **options,
                **sampling_options(temperature),
            )
    return comparisons


def _introduce(models: EFTModels, out: Console) -> None:
    sizes = ", ".join(f"{row.role} {tables.count_text(row.parameters)}" for row in models.describe())
    out.print(f"Three models of Python source ({sizes} parameters).")
    out.print("Below each prompt stands what large_base would say had it been tuned:")
    for source, meaning in _MEANINGS.items():
        out.print(
            Text("  ") + styled_pieces([(LOOKS[source].meaning, source)], has_colours(out)) + f": {meaning}"
        )


def _print_continuation(out: Console, prompt: str, continuation: Continuation) -> None:
    colours = has_colours(out)
    out.print()
    out.print(Text(prompt.rstrip("\n"), style="dim"), soft_wrap=True)
    # What is left after the last token is its own.
    sources = [*continuation.sources, continuation.sources[-1]]
    text = styled_pieces(zip(continuation.pieces, sources, strict=True), colours)
    text.rstrip()
    out.print(text, soft_wrap=True)
    out.print(Text("-- ") + source_counts(continuation.sources, colours))
