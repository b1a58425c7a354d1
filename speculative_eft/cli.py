"""The command line: `speculative-eft demo`, `generate` and `check`.

torch and transformers are imported inside the commands, after everything that can be checked without
them, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from . import console_tables as tables
from .console_text import (
    LOOKS,
    SourceStreamer,
    has_colours,
    source_counts,
    styled_pieces,
    token_pieces,
)

if TYPE_CHECKING:
    from .bench.comparison import Comparison, Decoder
    from .decoding import EFTOutput
    from .models import EFTModels

__all__ = ["app", "main"]

_NAME = "speculative-eft"
_ROLES: tuple[Literal["large_base", "small_tuned", "small_base"], ...] = (
    "large_base",
    "small_tuned",
    "small_base",
)
_Value = TypeVar("_Value")

app = typer.Typer(
    name=_NAME,
    help="Exact, fast sampling from emulated fine-tuned language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    What a user can get wrong becomes one line on stderr and status 2; Ctrl-C gives 130.
    """
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


# What an option's value must be


def _between(low: float, high: float, *, without_low: bool = False) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value) or not low <= value <= high or (without_low and value == low):
            if math.isinf(low):
                wanted = "a finite number"
            elif math.isinf(high):
                wanted = f"a finite number {'above' if without_low else 'of at least'} {low:g}"
            else:
                wanted = f"{'above' if without_low else 'at least'} {low:g} and at most {high:g}"
            raise typer.BadParameter(f"{value} is not {wanted}.")
        return value

    return check


def _finite_numbers(values: list[float] | None) -> list[float] | None:
    for value in values or ():
        _between(-math.inf, math.inf)(value)
    return values


def _seed(value: int | None) -> int | None:
    if value is not None and not -(2**63) <= value < 2**63:
        raise typer.BadParameter(f"{value} is not an integer of 64 bits.")
    return value


def _one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.")
        return value

    return check


def _draft_tokens(value: str) -> int | str:
    if value != "auto" and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise typer.BadParameter(f'{value} is neither an integer of at least 1 nor "auto".')
    return value if value == "auto" else int(value)


def _model(value: str | None) -> str | None:
    """A folder, or what could be a name on the Hub."""
    if value is not None and not Path(value).expanduser().is_dir():
        path_like = value.startswith(("/", ".", "~")) or value.count("/") > 1 or "\\" in value
        if not value or path_like:
            raise typer.BadParameter(f"there is no folder {value!r}.")
    return value


def _models(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        _model(value)
    return values


def _new_file(path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.absolute().parent)!r}.")
    return path


_Acceptance = Literal["block", "token", "shared_seed"]
_Draft = Literal["auto", "tuned", "pair"]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_MODELS, _LAW, _DRAFTING, _SAMPLING, _OUTPUT = "Models", "Target law", "Drafting", "Sampling", "Output"


def _option(help_text: str, metavar: str | None = None, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(help=help_text, metavar=metavar, rich_help_panel=panel, **settings)


def _choice(choices: Any, help_text: str, panel: str) -> Any:
    """An option for one of a Literal's values; typer's own wording of a mistake is pydantic's."""
    return _option(help_text, "|".join(get_args(choices)), panel, parser=_one_of(*get_args(choices)))


_MaxNewTokens = Annotated[int, _option("Most tokens to generate.", "N", _SAMPLING, min=1)]
_Temperature = Annotated[float, _option("0 is greedy.", "X", _SAMPLING, callback=_between(0, math.inf))]
_DraftTokens = Annotated[Any, _option("Tokens drafted a round.", "K|auto", _DRAFTING, parser=_draft_tokens)]
_AcceptanceRule = Annotated[_Acceptance, _choice(_Acceptance, "Rule; all leave the law as it is.", _DRAFTING)]


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
    prompts: Annotated[int, _option("Held-out prompts to continue.", "N", min=1)] = 4,
    repeats: Annotated[int, _option("Measured runs of each decoder on each prompt.", "N", min=1)] = 3,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", dir_okay=False, callback=_new_file, help="Save everything there."
        ),
    ] = None,
    max_new_tokens: _MaxNewTokens = 128,
    temperature: _Temperature = 1.0,
    seed: Annotated[int, _option("Of the first continuation.", "N", _SAMPLING, callback=_seed)] = 0,
    draft_tokens: _DraftTokens = "auto",
    acceptance: _AcceptanceRule = "block",
) -> None:
    """Continue held-out prompts with the bundled trio, and measure it against plain decoding."""
    from .models.demo import held_out_prompts

    texts = held_out_prompts()
    if prompts > len(texts):
        raise typer.BadParameter(f"there are {len(texts)} held-out prompts.", param_hint="'--prompts'")
    texts = texts[:prompts]
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    models = _load(None, [], None, "auto", None, err)
    with err.status("Importing"):
        from .bench.baselines import LargeOnlyDecoder
        from .bench.comparison import compare, environment
        from .decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder

    rules = list(dict.fromkeys((acceptance, *get_args(_Acceptance)[:2])))
    configs = {rule: EFTConfig(acceptance=rule, draft_tokens=draft_tokens) for rule in rules}
    speculative = {f"speculative, {rule}": EFTDecoder(models, config) for rule, config in configs.items()}
    fastest = next(iter(speculative))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "top_k": 0}

    _describe(models, out)
    _explain_looks(out)
    inputs = [models.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    continuations = []
    for index, (text, input_ids) in enumerate(zip(texts, inputs, strict=True)):
        output = speculative[fastest].generate(
            input_ids, seed=seed + index, return_dict_in_generate=True, **options, **_sampling(temperature)
        )
        tokens = output.sequences[0, input_ids.shape[1] :].tolist()
        sources = output.trace.source[0]
        pieces = list(token_pieces(models.tokenizer, input_ids[0].tolist(), tokens))
        _print_continuation(out, text, pieces, sources)
        continuations.append({"prompt": text, "text": "".join(pieces), "tokens": tokens, "sources": sources})

    plain: dict[str, Decoder] = {"naive": NaiveEFTDecoder(models), "large alone": LargeOnlyDecoder(models)}
    comparisons: dict[str, Comparison] = {}
    temperatures = list(dict.fromkeys((temperature, 0.0)))
    # Every rule is the same rule at temperature 0.
    turns = {
        value: plain | (speculative if value else {fastest: speculative[fastest]}) for value in temperatures
    }
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with progress:
        runs = progress.add_task(
            "Measuring", total=sum(map(len, turns.values())) * (repeats * len(inputs) + 1)
        )
        for value, decoders in turns.items():

            def show(name: str, label: str = f"T={value:g}") -> None:
                progress.update(runs, advance=1, description=f"Measuring at {label}: {name}")

            comparisons[f"T={value:g}"] = compare(
                decoders,
                inputs,
                reference="naive",
                repeats=repeats,
                seed=seed,
                on_run=show,
                **options,
                **_sampling(value),
            )
    for label, comparison in comparisons.items():
        out.print(tables.comparison_table(comparison, f"{label}, {len(inputs)} prompts, {repeats} runs each"))
        out.print(tables.phases_table(comparison))
    machine = environment()
    out.print(
        f"{machine.cpu}, {machine.threads} threads on {machine.cores} cores; torch {machine.torch}, "
        f"transformers {machine.transformers}, Python {machine.python}."
    )
    if json_file is not None:
        report = {
            "environment": asdict(machine),
            "models": [asdict(row) for row in models.describe()],
            "continuations": continuations,
            "comparisons": {label: comparison.to_dict() for label, comparison in comparisons.items()},
        }
        json_file.write_text(json.dumps(_without_nan(report), indent=1) + "\n", encoding="utf-8")
    out.print(tables.verdict(comparisons, fastest, "naive", "large alone"), style="bold")


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="- or nothing reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        _option("Read the prompt from a file.", "FILE", exists=True, dir_okay=False, readable=True),
    ] = None,
    large: Annotated[
        str | None, _option("Large base, by folder or Hub name.", "MODEL", _MODELS, callback=_model)
    ] = None,
    tuned: Annotated[
        list[str] | None, _option("Small tuned model; may be repeated.", "MODEL", _MODELS, callback=_models)
    ] = None,
    base: Annotated[
        str | None,
        _option("Small base. Without any of the three: the bundled trio.", "MODEL", _MODELS, callback=_model),
    ] = None,
    dtype: Annotated[
        _Dtype, _choice(_Dtype, "auto: as saved; float32 for the bundled trio.", _MODELS)
    ] = "auto",
    device_map: Annotated[
        str | None, _option("Where they go, as in transformers: cpu, cuda, auto...", "TEXT", _MODELS)
    ] = None,
    alpha: Annotated[
        list[float] | None,
        _option(
            "Scale of F - B, 1 unless given; repeated, one a tuned model.",
            "X",
            _LAW,
            callback=_finite_numbers,
        ),
    ] = None,
    beta: Annotated[
        float, _option("Scale of L - B.", "X", _LAW, callback=_between(-math.inf, math.inf))
    ] = 1.0,
    conservative_top_p: Annotated[
        float | None,
        _option(
            "Apply L - B only in this top-p set of the small pair's law.",
            "X",
            _LAW,
            callback=_between(0, 1, without_low=True),
        ),
    ] = None,
    draft_tokens: _DraftTokens = "auto",
    acceptance: _AcceptanceRule = "block",
    draft: Annotated[_Draft, _choice(_Draft, "Small models that draft.", _DRAFTING)] = "auto",
    draft_temperature: Annotated[
        float | None,
        _option(
            "Other than --temperature.", "X", _DRAFTING, callback=_between(0, math.inf, without_low=True)
        ),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", rich_help_panel=_DRAFTING, help="Do not speculate.")
    ] = False,
    max_new_tokens: _MaxNewTokens = 128,
    temperature: _Temperature = 1.0,
    top_k: Annotated[
        int, _option("Keep the k most probable tokens; 0 keeps all.", "K", _SAMPLING, min=0)
    ] = 0,
    top_p: Annotated[
        float, _option("Keep the most probable tokens of this mass.", "X", _SAMPLING, callback=_between(0, 1))
    ] = 1.0,
    min_p: Annotated[
        float, _option("Keep tokens of this share of the top one's.", "X", _SAMPLING, callback=_between(0, 1))
    ] = 0.0,
    seed: Annotated[
        int | None, _option("Gives the same text again; drawn unless given.", "N", _SAMPLING, callback=_seed)
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", rich_help_panel=_OUTPUT, help="Seed and statistics on standard error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="One JSON object instead of text.")
    ] = False,
    show_sources: Annotated[
        bool | None, _option("Tell drafted tokens from others; on where there are colours.", None, _OUTPUT)
    ] = None,
) -> None:
    """Continue a prompt; only the continuation goes to standard output."""
    tuned, alpha = tuned or [], alpha or [1.0]
    text = _read_prompt(prompt, file)
    if any((large, tuned, base)) and not all((large, tuned, base)):
        raise typer.BadParameter(
            "give all three of --large, --tuned and --base, or none for the bundled trio."
        )
    if len(alpha) not in (1, max(len(tuned), 1)):
        raise typer.BadParameter(
            f"{len(alpha)} values for {max(len(tuned), 1)} tuned models.", param_hint="'--alpha'"
        )
    seed = secrets.randbits(63) if seed is None else seed
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    models = _load(large, tuned, base, dtype, device_map, err)
    from .decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder

    if models.tokenizer is None:
        raise ValueError("none of the models comes with a tokenizer")
    config = EFTConfig(
        alpha=alpha[0] if len(alpha) == 1 else alpha,
        beta=beta,
        draft_tokens=draft_tokens,
        acceptance=acceptance,
        draft=draft,
        draft_temperature=draft_temperature,
        conservative_top_p=conservative_top_p,
    )
    decoder = (NaiveEFTDecoder if naive else EFTDecoder)(models, config)
    input_ids = models.tokenizer(text, return_tensors="pt").input_ids
    prompt_ids = input_ids[0].tolist()
    streamer = None
    if not as_json:
        if show_sources is None:
            show_sources = has_colours(out)
        streamer = SourceStreamer(models.tokenizer, prompt_ids, out, show_sources)
    start = perf_counter()
    output = decoder.generate(
        input_ids,
        seed=seed,
        streamer=streamer,
        return_dict_in_generate=True,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        **_sampling(temperature),
    )
    seconds = perf_counter() - start
    if as_json:
        tokens = output.sequences[0, len(prompt_ids) :].tolist()
        record = {
            "text": "".join(token_pieces(models.tokenizer, prompt_ids, tokens)),
            "tokens": tokens,
            "seed": seed,
            "config": asdict(config),
            **_numbers(output),
        }
        print(json.dumps(_without_nan(record), ensure_ascii=False))
    if stats:
        err.print(tables.stats_table(output.stats, seed, seconds))


@app.command()
def check(
    large: Annotated[
        str, typer.Argument(callback=_model, metavar="LARGE", help="Large base, by folder or Hub name.")
    ],
    tuned: Annotated[
        list[str], typer.Argument(callback=_models, metavar="TUNED", help="Small tuned models.")
    ],
    base: Annotated[str, typer.Argument(callback=_model, metavar="BASE", help="Small base.")],
    context: Annotated[
        int | None,
        _option("Tokens of a sequence; 4096 unless given, or less where a model ends.", "N", min=1),
    ] = None,
    batch: Annotated[int, _option("Sequences at once.", "N", min=1)] = 1,
) -> None:
    """Tell whether models would work together and what memory they need, without loading them.

    Exit status: 0 if they would, 1 if not, 2 for a folder that is not there.
    """
    from .models import IncompatibleModelsError, find_sources

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        find_sources(large, tuned, base)
    except IncompatibleModelsError as error:
        _print_problems(out, [str(error)])
        raise typer.Exit(1) from error
    with err.status("Reading configurations"):
        from .models import inspect_trio

        report = inspect_trio(large, tuned, base)
    if report.models:
        limits = [model.context for model in report.models if model.context is not None]
        tokens = context or min([4096, *limits])
        out.print(tables.models_table(report.models))
        out.print(tables.memory_table(report.models, tokens, batch))
        for model in report.models:
            if model.context is not None and model.context < tokens:
                out.print(f"note: {model.role} ends at {model.context:,} tokens, before {tokens:,}.")
    for sentence in report.differences:
        out.print(f"differs: {sentence}.")
    if not report.compatible:
        _print_problems(out, report.problems)
        raise typer.Exit(1)
    out.print("They would work together.", style="bold green")


def _print_problems(out: Console, problems: Sequence[str]) -> None:
    for sentence in problems:
        out.print(f"problem: {sentence}")
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
        elif prompt is None and sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, --file, or text on standard input.")
        else:
            text = sys.stdin.buffer.read().decode()
    except UnicodeError as error:
        raise typer.BadParameter(f"the prompt is not UTF-8 text ({error}).") from error
    if not text:
        raise typer.BadParameter("the prompt is empty; it needs at least one character.")
    return text


def _load(
    large: str | None, tuned: list[str], base: str | None, dtype: str, device_map: str | None, err: Console
) -> EFTModels:
    """The models asked for, or the bundled trio; problems are reported before torch is imported."""
    from .models import find_sources

    if large is None or base is None:
        from .models.demo import weights_folder

        large, first, base = (str(weights_folder(role)) for role in _ROLES)
        tuned = [first]
        dtype = "float32" if dtype == "auto" else dtype
    find_sources(large, tuned, base)
    with _loading(err, all(Path(name).expanduser().is_dir() for name in (large, *tuned, base))):
        from .models import EFTModels

        models = EFTModels.from_pretrained(large, tuned, base, dtype=dtype, device_map=device_map)
        models.runners()
    return models


@contextmanager
def _loading(err: Console, local: bool) -> Iterator[None]:
    """Shows that models are loading; the Hub's own bars tell more about downloads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not local:
        yield
        return
    logging.disable_progress_bar()
    with err.status("Loading the models"):
        yield


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _numbers(output: EFTOutput) -> dict[str, Any]:
    """Statistics and trace of one sequence as plain containers."""
    stats, trace = output.stats, output.trace
    assert stats is not None and trace is not None
    return {
        "stats": {
            **asdict(stats),
            "acceptance_rate": stats.acceptance_rate,
            "tokens_per_round": stats.tokens_per_round,
            "large_calls_per_token": stats.large_calls_per_token,
        },
        "trace": {
            "source": trace.source[0],
            "large": trace.large[0].tolist(),
            "tuned": [tuned[0].tolist() for tuned in trace.tuned],
            "base": trace.base[0].tolist(),
            "target": trace.target[0].tolist(),
        },
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(models: EFTModels, out: Console) -> None:
    parts = [f"{row.role} {tables.count_text(row.parameters)}" for row in models.describe()]
    out.print(f"The bundled trio, trained on Python source: {', '.join(parts)} parameters.")
    out.print("Sampled: what large_base would say had it been tuned as small_base was into small_tuned.\n")


def _explain_looks(out: Console) -> None:
    meanings = {
        "draft": "a token that small_tuned drafted and the target accepted",
        "residual": "a token the target drew in place of a rejected one",
        "bonus": "a token the target drew after accepting a whole draft",
    }
    for source, meaning in meanings.items():
        out.print(styled_pieces([(LOOKS[source].meaning, source)], has_colours(out)) + Text(f": {meaning}"))


def _print_continuation(out: Console, prompt: str, pieces: Sequence[str], sources: Sequence[str]) -> None:
    colours = has_colours(out)
    out.print()
    out.print(Text(prompt.rstrip("\n"), style="dim" if colours else ""), soft_wrap=True)
    sourced = zip(pieces, [*sources, "draft"], strict=True)
    out.print(styled_pieces(sourced, colours), soft_wrap=True)
    out.print(Text("-- ") + source_counts(sources, colours))


if __name__ == "__main__":
    sys.exit(main())
