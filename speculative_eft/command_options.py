"""What options of several commands share: the values they take, and the models they name.

Nothing here imports torch before the options have been read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .models import EFTModels

__all__ = [
    "DRAFTING",
    "LARGEST_WEIGHT",
    "LAW",
    "MODELS",
    "MOST_DRAFT_TOKENS",
    "OUTPUT",
    "SAMPLING",
    "Acceptance",
    "AcceptanceRule",
    "Draft",
    "DraftTokens",
    "DraftWeights",
    "LargeBase",
    "MaxNewTokens",
    "ModelDtype",
    "SmallBase",
    "SmallTuned",
    "Temperature",
    "between",
    "check_writable",
    "choice",
    "draft_tokens_value",
    "each",
    "in_a_folder",
    "load_models",
    "may_compile",
    "model_name",
    "model_names",
    "new_file",
    "one_of",
    "option",
    "seed_value",
    "some_text",
    "tokenizer_of",
    "trio_or_demo",
    "weight_value",
    "weight_values",
]

# EFTConfig's bounds, of draft_tokens, and of alpha and beta either way.
MOST_DRAFT_TOKENS = 4096
LARGEST_WEIGHT = 1e30

_COMPILING = "compiling for this processor, the first time: a minute or two"

# A process may say it once: hundreds of functions are compiled, in several places.
_is_told = False

_ROLES: tuple[Literal["large_base", "small_tuned", "small_base"], ...] = (
    "large_base",
    "small_tuned",
    "small_base",
)


def between(low: float, high: float, *, without_low: bool = False) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value) or not low <= value <= high or (without_low and value == low):
            if math.isinf(high):
                wanted = f"a finite number {'above' if without_low else 'of at least'} {low:g}"
            else:
                wanted = f"{'above' if without_low else 'at least'} {low:g} and at most {high:g}"
            raise typer.BadParameter(f"{value} is not {wanted}.")
        return value

    return check


def each(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """The callback of an option that may be repeated, by that of a single value."""

    def check_all(values: Any) -> Any:
        for value in values or ():
            check(value)
        return values

    return check_all


def seed_value(value: int | None) -> int | None:
    if value is not None and not -(2**63) <= value < 2**63:
        raise typer.BadParameter(f"{value} is not an integer of 64 bits.")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.")
        return value

    return check


def draft_tokens_value(value: str) -> int | str:
    is_number = value.isascii() and value.isdigit()
    if value != "auto" and not (is_number and 1 <= int(value) <= MOST_DRAFT_TOKENS):
        wanted = f"an integer of at least 1 and at most {MOST_DRAFT_TOKENS}"
        raise typer.BadParameter(f'{value} is neither {wanted} nor "auto".')
    return value if value == "auto" else int(value)


def model_name(value: str | None) -> str | None:
    """A folder, or what could be a name on the Hub."""
    if value is not None and not Path(value).expanduser().is_dir():
        path_like = value.startswith(("/", ".", "~")) or value.count("/") > 1 or "\\" in value
        if not value or path_like:
            raise typer.BadParameter(f"there is no folder {value!r}.")
    return value


def _some_characters(value: str) -> str:
    if not value:
        raise typer.BadParameter("it needs at least one character.")
    return value


def in_a_folder(path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.absolute().parent)!r}.")
    return path


def new_file(path: Path | None) -> Path | None:
    """A file that can be written, which is tried before anything runs; what it holds is left alone."""
    in_a_folder(path)
    if path is not None:
        check_writable(path)
    return path


def check_writable(path: Path, param_hint: str | None = None) -> None:
    """Raise typer.BadParameter where `path` cannot be written; a file that was not there is not left."""
    try:
        is_new = not path.exists()
        # A pipe that is opened and closed would end for its reader.
        if is_new or path.is_file() or path.is_dir():
            path.open("ab").close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise typer.BadParameter(f"{path} cannot be written ({reason}).", param_hint=param_hint) from error
    if is_new:
        path.unlink()


weight_value = between(-LARGEST_WEIGHT, LARGEST_WEIGHT)
weight_values = each(weight_value)
some_text = each(_some_characters)
model_names = each(model_name)

Acceptance = Literal["block", "token", "shared_seed"]
Draft = Literal["auto", "tuned", "pair"]
DraftWeights = Literal["auto", "own", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MODELS, LAW, DRAFTING, SAMPLING, OUTPUT = "Models", "Target law", "Drafting", "Sampling", "Output"


def option(help_text: str, metavar: str | None = None, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(help=help_text, metavar=metavar, rich_help_panel=panel, **settings)


def choice(choices: Any, help_text: str, panel: str) -> Any:
    """An option for one of a Literal's values; typer's own wording of a mistake is pydantic's."""
    return option(help_text, "|".join(get_args(choices)), panel, parser=one_of(*get_args(choices)))


LargeBase = Annotated[
    str | None, option("Large base, by folder or Hub name.", "MODEL", MODELS, callback=model_name)
]
SmallTuned = Annotated[
    list[str] | None,
    option(
        "Small tuned model, or LoRA adapter of the base; may be repeated.",
        "MODEL",
        MODELS,
        callback=model_names,
    ),
]
SmallBase = Annotated[
    str | None,
    option("Small base. Without any of the three: the bundled trio.", "MODEL", MODELS, callback=model_name),
]
ModelDtype = Annotated[Dtype, choice(Dtype, "auto: as saved; float32 for the bundled trio.", MODELS)]
MaxNewTokens = Annotated[int, option("Most tokens to generate.", "N", SAMPLING, min=1)]
Temperature = Annotated[float, option("0 is greedy.", "X", SAMPLING, callback=between(0, math.inf))]
DraftTokens = Annotated[Any, option("Tokens drafted a round.", "K|auto", DRAFTING, parser=draft_tokens_value)]
AcceptanceRule = Annotated[Acceptance, choice(Acceptance, "Rule; all leave the law as it is.", DRAFTING)]


def trio_or_demo(
    large: str | None, tuned: list[str], base: str | None, dtype: str
) -> tuple[str, list[str], str, str]:
    """The models that were named, or the bundled trio if none was, and their dtype."""
    if large and tuned and base:
        return large, tuned, base, dtype
    if large or tuned or base:
        raise typer.BadParameter(
            "give all three of --large, --tuned and --base, or none for the bundled trio."
        )
    from .models.demo import weights_folder

    large, first, base = (str(weights_folder(role)) for role in _ROLES)
    return large, [first], base, "float32" if dtype == "auto" else dtype


def load_models(
    large: str, tuned: list[str], base: str, dtype: str, device_map: str | None, err: Console
) -> EFTModels:
    """The models of these names; problems are reported before torch is imported."""
    from .models import find_sources

    find_sources(large, tuned, base)
    local = all(Path(name).expanduser().is_dir() for name in (large, *tuned, base))
    # The Hub's own bars tell more about downloads.
    with err.status("Loading the models") if local else nullcontext():
        from transformers.utils import logging

        from .models import EFTModels

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if local:
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        models = EFTModels.from_pretrained(large, tuned, base, dtype=dtype, device_map=device_map)
    with may_compile("Preparing the models", err):
        models.runners()
    return models


@contextmanager
def may_compile(doing: str, err: Console) -> Iterator[None]:
    """Says on a terminal what goes on; elsewhere, in one line, that something is compiled, if anything is."""
    if err.is_terminal:
        with err.status(f"{doing} (and {_COMPILING})"):
            yield
        return
    import torch

    from .kernels import backend

    if backend(torch.device("cpu")) != "numba":
        yield
        return
    from numba.core import event

    class Teller(event.Listener):  # type: ignore[misc]
        def on_start(self, _: object) -> None:
            global _is_told
            if not _is_told:
                _is_told = True
                err.print(f"{doing}, and {_COMPILING}.", soft_wrap=True)

        def on_end(self, _: object) -> None:
            pass

    # What Numba has kept is loaded without this event.
    with event.install_listener("numba:compile", Teller()):
        yield


def tokenizer_of(models: EFTModels) -> Any:
    """Theirs.

    Raises:
        ValueError: if they have none.
    """
    if models.tokenizer is None:
        raise ValueError("none of the models comes with a tokenizer")
    return models.tokenizer
