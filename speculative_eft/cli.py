"""The command line: `speculative-eft demo`, `generate` and `check`.

torch and transformers are imported inside the commands, after everything that can be checked without
them, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from . import console_tables as tables
from .console_text import has_colours

if TYPE_CHECKING:
    from .models import EFTModels

__all__ = ["app", "main"]

_NAME = "speculative-eft"
_ROLES: tuple[Literal["large_base", "small_tuned", "small_base"], ...] = (
    "large_base",
    "small_tuned",
    "small_base",
)

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
    shown: Annotated[int, _option("Held-out prompts whose continuations are shown.", "N", min=0)] = 4,
    prompts: Annotated[
        int | None, _option("Held-out prompts to measure on; all of them by default.", "N", min=1)
    ] = None,
    repeats: Annotated[int, _option("Measured runs of each decoder on each prompt.", "N", min=1)] = 1,
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
    if prompts is not None and prompts > len(texts):
        raise typer.BadParameter(f"there are {len(texts)} held-out prompts.", param_hint="'--prompts'")
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    models = _load(None, [], None, "auto", None, err)
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
        json_file.write_text(json.dumps(_without_nan(report), indent=1) + "\n", encoding="utf-8")


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
        list[str] | None,
        _option(
            "Small tuned model, or LoRA adapter of the base; may be repeated.",
            "MODEL",
            _MODELS,
            callback=_models,
        ),
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
    from .continuation import SourceStreamer, continue_prompt
    from .decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder

    tokenizer: Any = models.tokenizer
    if tokenizer is None:
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
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    streamer = None
    if not as_json:
        sources_shown = has_colours(out) if show_sources is None else show_sources
        streamer = SourceStreamer(tokenizer, input_ids[0].tolist(), out, sources_shown)
    continuation = continue_prompt(
        (NaiveEFTDecoder if naive else EFTDecoder)(models, config),
        tokenizer,
        input_ids,
        seed,
        temperature,
        streamer,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if as_json:
        record = {"prompt": text, "seed": seed, "config": asdict(config), **continuation.to_dict()}
        print(json.dumps(_without_nan(record), ensure_ascii=False))
    if stats:
        err.print(tables.stats_table(continuation.stats, seed, continuation.seconds))


@app.command()
def check(
    large: Annotated[
        str, typer.Argument(callback=_model, metavar="LARGE", help="Large base, by folder or Hub name.")
    ],
    tuned: Annotated[
        list[str],
        typer.Argument(
            callback=_models, metavar="TUNED", help="Small tuned models or LoRA adapters of BASE."
        ),
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
                _print_sentence(
                    out, f"note: {model.role} ends at {model.context:,} tokens, before {tokens:,}."
                )
    for sentence in report.differences:
        _print_sentence(out, f"differs: {sentence}.")
    if not report.compatible:
        _print_problems(out, report.problems)
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
    local = all(Path(name).expanduser().is_dir() for name in (large, *tuned, base))
    # The Hub's own bars tell more about downloads.
    loading = "Loading the models (and compiling them for this processor, the first time: half a minute)"
    with err.status(loading) if local else nullcontext():
        from transformers.utils import logging

        from .models import EFTModels

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if local:
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        models = EFTModels.from_pretrained(large, tuned, base, dtype=dtype, device_map=device_map)
        models.runners()
    return models


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
