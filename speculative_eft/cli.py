"""The command line: `speculative-eft demo`, `generate`, `check` and `bench`.

torch and transformers are imported inside the commands, after everything that can be checked without
them, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import io
import json
import math
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import console_tables as tables
from .bench.json_files import without_nan
from .bench_command import bench_app
from .command_options import (
    DRAFTING,
    LAW,
    MODELS,
    OUTPUT,
    SAMPLING,
    AcceptanceRule,
    Draft,
    DraftTokens,
    DraftWeights,
    LargeBase,
    MaxNewTokens,
    ModelDtype,
    SmallBase,
    SmallTuned,
    Temperature,
    between,
    choice,
    load_models,
    may_compile,
    model_name,
    model_names,
    new_file,
    option,
    seed_value,
    some_text,
    tokenizer_of,
    trio_or_demo,
    weight_value,
    weight_values,
)
from .console_text import has_colours

__all__ = ["app", "main"]

_NAME = "speculative-eft"

app = typer.Typer(
    name=_NAME,
    help="Exact, fast sampling from emulated fine-tuned language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    What a user can get wrong becomes one line on stderr and status 2; Ctrl-C gives 130.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a console cannot show becomes a question mark, and nothing is lost for it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        command = typer.main.get_command(app)
        status = command.main(args=arguments, prog_name=_NAME, standalone_mode=False)
    except typer.TyperException as error:
        return _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        # torch has no exception of its own for a CPU without enough memory.
        if "memory" not in str(error):
            raise
        return _fail(str(error))
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print(f"{_NAME}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{_NAME} {version(_NAME)}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    shown: Annotated[int, option("Held-out prompts whose continuations are shown.", "N", min=0)] = 4,
    prompts: Annotated[
        int | None, option("Held-out prompts to measure on; all of them by default.", "N", min=1)
    ] = None,
    repeats: Annotated[int, option("Measured runs of each decoder on each prompt.", "N", min=1)] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", dir_okay=False, callback=new_file, help="Save everything there."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    seed: Annotated[int, option("Of the first continuation.", "N", SAMPLING, callback=seed_value)] = 0,
    draft_tokens: DraftTokens = "auto",
    acceptance: AcceptanceRule = "block",
) -> None:
    """Continue held-out prompts with the bundled trio, and measure it against plain decoding."""
    from .models.demo import held_out_prompts

    texts = held_out_prompts()
    if prompts is not None and prompts > len(texts):
        raise typer.BadParameter(f"there are {len(texts)} held-out prompts.", param_hint="'--prompts'")
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    models = load_models(*trio_or_demo(None, [], None, "auto"), None, err)
    from .decoding import EFTConfig
    from .demonstration import show_demo

    report = show_demo(
        models,
        texts[:shown],
        texts[:prompts],
        EFTConfig(acceptance=acceptance, draft_tokens=draft_tokens),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        repeats=repeats,
        out=out,
        err=err,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(without_nan(report), indent=1) + "\n", encoding="utf-8")


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="- or nothing reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        option("Read the prompt from a file.", "FILE", exists=True, dir_okay=False, readable=True),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The prompt is a user's turn: in the tuned model's chat template, plain for bases."
        ),
    ] = False,
    large: LargeBase = None,
    tuned: SmallTuned = None,
    base: SmallBase = None,
    dtype: ModelDtype = "auto",
    device_map: Annotated[
        str | None, option("Where they go, as in transformers: cpu, cuda, auto...", "TEXT", MODELS)
    ] = None,
    alpha: Annotated[
        list[float] | None,
        option(
            "Scale of F - B, 1 unless given; repeated, one a tuned model.",
            "X",
            LAW,
            callback=weight_values,
        ),
    ] = None,
    beta: Annotated[float, option("Scale of L - B.", "X", LAW, callback=weight_value)] = 1.0,
    conservative_top_p: Annotated[
        float | None,
        option(
            "Apply L - B only in this top-p set of the small pair's law.",
            "X",
            LAW,
            callback=between(0, 1, without_low=True),
        ),
    ] = None,
    draft_tokens: DraftTokens = "auto",
    acceptance: AcceptanceRule = "block",
    draft: Annotated[Draft, choice(Draft, "Small models that draft.", DRAFTING)] = "auto",
    draft_weights: Annotated[
        DraftWeights, choice(DraftWeights, "Weights they draft by; int8 copies them.", DRAFTING)
    ] = "auto",
    draft_temperature: Annotated[
        float | None,
        option("Other than --temperature.", "X", DRAFTING, callback=between(0, math.inf, without_low=True)),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", rich_help_panel=DRAFTING, help="Do not speculate.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    stop: Annotated[
        list[str] | None,
        option("End with this text; may be repeated.", "TEXT", SAMPLING, callback=some_text),
    ] = None,
    temperature: Temperature = 1.0,
    top_k: Annotated[int, option("Keep the k most probable tokens; 0 keeps all.", "K", SAMPLING, min=0)] = 0,
    top_p: Annotated[
        float, option("Keep the most probable tokens of this mass.", "X", SAMPLING, callback=between(0, 1))
    ] = 1.0,
    min_p: Annotated[
        float, option("Keep tokens of this share of the top one's.", "X", SAMPLING, callback=between(0, 1))
    ] = 0.0,
    seed: Annotated[
        int | None,
        option(
            "Gives the same text again, elsewhere or with other threads by --draft-tokens K; else drawn.",
            "N",
            SAMPLING,
            callback=seed_value,
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", rich_help_panel=OUTPUT, help="Seed and statistics on standard error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="One JSON object instead of text.")
    ] = False,
    show_sources: Annotated[
        bool | None, option("Tell drafted tokens from others; on where there are colours.", None, OUTPUT)
    ] = None,
) -> None:
    """Continue a prompt; only the continuation goes to standard output."""
    tuned, alpha = tuned or [], alpha or [1.0]
    text = _read_prompt(prompt, file)
    if len(alpha) not in (1, max(len(tuned), 1)):
        raise typer.BadParameter(
            f"{len(alpha)} values: give one, or one for each --tuned ({max(len(tuned), 1)} here).",
            param_hint="'--alpha'",
        )
    seed = secrets.randbits(63) if seed is None else seed
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    models = load_models(*trio_or_demo(large, tuned, base, dtype), device_map, err)
    from .continuation import SourceStreamer, continue_prompt
    from .decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder, plain_chat

    tokenizer = tokenizer_of(models)
    if chat and not getattr(models.chat_tokenizer, "chat_template", None):
        raise typer.BadParameter("the tuned model's tokenizer has no chat template.", param_hint="'--chat'")
    messages = [{"role": "user", "content": text}] if chat else None
    config = EFTConfig(
        alpha=alpha[0] if len(alpha) == 1 else alpha,
        beta=beta,
        draft_tokens=draft_tokens,
        acceptance=acceptance,
        draft=draft,
        draft_weights=draft_weights,
        draft_temperature=draft_temperature,
        conservative_top_p=conservative_top_p,
    )
    input_ids = tokenizer(plain_chat(messages) if messages else text, return_tensors="pt").input_ids
    streamer = None
    if not as_json:
        sources_shown = has_colours(out) if show_sources is None else show_sources
        streamer = SourceStreamer(tokenizer, input_ids[0].tolist(), out, sources_shown)
    with may_compile("Preparing to decode", err):
        decoder = (NaiveEFTDecoder if naive else EFTDecoder)(models, config)
    continuation = continue_prompt(
        decoder,
        tokenizer,
        input_ids,
        seed,
        temperature,
        streamer,
        messages,
        max_new_tokens=max_new_tokens,
        stop_strings=stop or None,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if as_json:
        record = {"prompt": text, "seed": seed, "config": asdict(config), **continuation.to_dict()}
        as_it_is = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        print(json.dumps(without_nan(record), ensure_ascii=not as_it_is))
    if stats:
        err.print(tables.stats_table(continuation.stats, seed, continuation.seconds))


@app.command()
def check(
    large: Annotated[
        str, typer.Argument(callback=model_name, metavar="LARGE", help="Large base, by folder or Hub name.")
    ],
    tuned: Annotated[
        list[str],
        typer.Argument(
            callback=model_names, metavar="TUNED", help="Small tuned models or LoRA adapters of BASE."
        ),
    ],
    base: Annotated[str, typer.Argument(callback=model_name, metavar="BASE", help="Small base.")],
    context: Annotated[
        int | None,
        option("Tokens of a sequence; 4096 unless given, or less where a model ends.", "N", min=1),
    ] = None,
    batch: Annotated[int, option("Sequences at once.", "N", min=1)] = 1,
) -> None:
    """Tell whether models would work together and what memory they need, without loading them.

    Exit status: 0 if they would, 1 if not, 2 if they could not be checked, as where a folder holds no model
    or the Hub cannot be reached.
    """
    from .models import IncompatibleModelsError, UnavailableModelsError, find_sources

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        find_sources(large, tuned, base)
    except UnavailableModelsError as error:
        raise ValueError(f"they could not be checked. {error}") from error
    except IncompatibleModelsError as error:
        _print_problems(out, [str(error)])
        raise typer.Exit(1) from error
    with err.status("Reading configurations"):
        from .models import inspect_trio

        report = inspect_trio(large, tuned, base)
    if not report.checked:
        raise ValueError(f"they could not be checked. {report.problems[0]}")
    problems = list(report.problems)
    if report.models:
        limits = [model.context for model in report.models if model.context is not None]
        tokens = context or min([4096, *limits])
        out.print(tables.models_table(report.models))
        out.print(tables.memory_table(report.models, tokens, batch))
        for model in report.models:
            if model.context is not None and model.context < tokens:
                problems.append(f"{model.role} ends at {model.context:,} tokens, before {tokens:,}.")
    for sentence in report.differences:
        _print_sentence(out, f"differs: {sentence}.")
    if problems:
        _print_problems(out, problems)
        raise typer.Exit(1)
    out.print("They would work together.", style="bold green")


def _print_sentence(out: Console, sentence: str) -> None:
    # Names may hold brackets, and a pipe wants one line a sentence.
    out.print(sentence, markup=False, soft_wrap=True)


def _print_problems(out: Console, problems: Sequence[str]) -> None:
    for sentence in problems:
        _print_sentence(out, f"problem: {sentence}")
    out.print("They would not work together.", style="bold red")


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt exactly as given, final line break included."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give a prompt or --file, not both.")
    try:
        if file is not None:
            text = file.read_bytes().decode()
        elif prompt is not None and prompt != "-":
            text = prompt
            text.encode()
        # There is no standard input where it was closed.
        elif sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise typer.BadParameter("give a prompt, --file, or text on standard input.")
        else:
            text = sys.stdin.buffer.read().decode()
    except UnicodeError as error:
        raise typer.BadParameter(f"the prompt is not UTF-8 text ({error}).") from error
    if not text:
        where = "'--file'" if file is not None else "'PROMPT'"
        raise typer.BadParameter("the prompt is empty; it needs at least one character.", param_hint=where)
    return text


if __name__ == "__main__":
    sys.exit(main())
