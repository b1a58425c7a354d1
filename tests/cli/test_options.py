"""The values that options take are those of the library, which help and mistakes are not to import."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from speculative_eft import command_options
from speculative_eft.decoding import config
from speculative_eft.kernels import AcceptanceRule


@pytest.mark.parametrize(
    ("ours", "of_the_library"),
    [
        (command_options.Acceptance, AcceptanceRule),
        (command_options.Draft, config.DraftKind),
        (command_options.DraftWeights, config.DraftWeights),
    ],
    ids=["acceptance", "draft", "draft_weights"],
)
def test_options_take_what_the_library_takes(ours: Any, of_the_library: Any) -> None:
    assert get_args(ours) == get_args(of_the_library)


def test_numbers_end_where_those_of_the_library_end() -> None:
    assert command_options.MOST_DRAFT_TOKENS == config._MOST_DRAFT_TOKENS
    assert command_options.LARGEST_WEIGHT == config._LARGEST_WEIGHT


def console(is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


def test_a_terminal_is_told_how_long_compiling_takes_and_so_is_who_reads() -> None:
    err = console(is_terminal=True)
    with command_options.may_compile("Preparing", err):
        pass
    assert (
        "Preparing (and compiling for this processor, the first time: a minute or two)" in err.file.getvalue()
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "compiled for the processor, which takes a minute or two" in " ".join(readme.split())


def test_without_a_terminal_a_line_is_written_only_where_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    monkeypatch.delenv("SPECULATIVE_EFT_BACKEND", raising=False)
    monkeypatch.setattr(command_options, "_is_told", False)
    err = console(is_terminal=False)
    with command_options.may_compile("Preparing", err):
        pass
    assert err.file.getvalue() == ""
    for _ in range(2):
        with command_options.may_compile("Preparing", err):
            numba.njit("int64(int64)")(lambda number: number + 1)
    assert err.file.getvalue() == (
        "Preparing, and compiling for this processor, the first time: a minute or two.\n"
    )
