"""`generate`: where prompts come from, what goes to standard output, and that a seed gives it again."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from speculative_eft.cli import main
from speculative_eft.console_text import LOOKS, has_colours, marked
from speculative_eft.continuation import SourceStreamer, continue_prompt
from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels, ModelRunner

from .conftest import Outcome, Trio

PROMPT = "def add(first, second):\n"
OPTIONS = ("--max-new-tokens", "24", "--seed", "5")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def ended(text: str) -> str:
    """`text` with a line break at its end, as a pipe gets it."""
    return text if text.endswith("\n") else text + "\n"


def test_argument_file_and_standard_input_are_alike(
    run: Callable[..., Outcome], trio: Trio, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = (*trio.options, *OPTIONS)
    outcomes = [
        run("generate", PROMPT, *options),
        run("generate", "--file", str(tmp_path / "prompt.txt"), *options),
        run("generate", "-", *options, stdin=PROMPT),
        run("generate", *options, stdin=PROMPT),
    ]
    assert outcomes[0].status == 0 and outcomes[0].out
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert "\x1b" not in outcomes[0].out and outcomes[0].err == ""


def test_json_holds_the_streamed_text(run: Callable[..., Outcome], trio: Trio, tokenizer: Any) -> None:
    record = json.loads(run("generate", PROMPT, *trio.options, *OPTIONS, "--json").out)
    assert ended(record["text"]) == run("generate", PROMPT, *trio.options, *OPTIONS).out
    assert record["text"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
    assert record["seed"] == 5
    assert record["stats"]["emitted_tokens"] == len(record["tokens"]) == len(record["trace"]["source"])
    assert set(record["trace"]["source"]) <= {"draft", "residual", "bonus"}
    assert len(record["trace"]["tuned"][0]) == len(record["tokens"])


def test_a_console_of_few_characters_loses_nothing(
    run: Callable[..., Outcome], trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = json.loads(run("generate", PROMPT, *trio.options, *OPTIONS, "--json").out)
    assert not wanted["text"].isascii()
    for as_json in (False, True):
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", console)
        assert main(["generate", PROMPT, *trio.options, *OPTIONS, *["--json"] * as_json]) == 0
        console.flush()
        shown = console.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        text = wanted["text"].encode("ascii", "replace").decode()
        assert json.loads(shown)["text"] == wanted["text"] if as_json else shown == ended(text)


def test_a_drawn_seed_gives_the_text_again(run: Callable[..., Outcome], trio: Trio) -> None:
    first = json.loads(run("generate", PROMPT, *trio.options, "--max-new-tokens", "24", "--json").out)
    options = ("--max-new-tokens", "24", "--seed", str(first["seed"]))
    outcome = run("generate", PROMPT, *trio.options, *options, "--stats")
    assert outcome.out == ended(first["text"])
    assert str(first["seed"]) in outcome.err and "acceptance" in outcome.err


def test_shared_seed_gives_naive_text(run: Callable[..., Outcome], trio: Trio) -> None:
    options = (*trio.options, *OPTIONS, "--alpha", "0.5", "--beta", "1.5")
    shared = (*options, "--acceptance", "shared_seed", "--draft-tokens", "3")
    naive = run("generate", PROMPT, *options, "--naive")
    assert run("generate", PROMPT, *shared).out == naive.out != ""
    assert run("generate", PROMPT, *shared, "--draft-weights", "int8").out == naive.out


def test_any_finite_temperature_is_taken(run: Callable[..., Outcome], trio: Trio) -> None:
    hot = ("--temperature", "1e39", "--draft-temperature", "1e39")
    outcome = run("generate", PROMPT, *trio.options, *OPTIONS, *hot)
    assert outcome.status == 0 and outcome.out and outcome.err == ""


def test_several_tuned_models_take_an_alpha_each(run: Callable[..., Outcome], trio: Trio) -> None:
    options = (*trio.options, "--tuned", str(trio.base), "--alpha", "0.7", "--alpha", "0.3")
    record = json.loads(run("generate", PROMPT, *options, *OPTIONS, "--json").out)
    assert record["config"]["alpha"] == [0.7, 0.3] and len(record["trace"]["tuned"]) == 2


def test_text_that_stops_ends_the_continuation(run: Callable[..., Outcome], trio: Trio) -> None:
    whole = json.loads(run("generate", PROMPT, *trio.options, *OPTIONS, "--json").out)
    assert len(whole["tokens"]) == 24
    # Not in the names of special tokens, which are not shown.
    found = re.search("[A-Zf-mp-xz]", whole["text"])
    assert found is not None
    stop = found[0]
    outcome = run(
        "generate", PROMPT, *trio.options, *OPTIONS, "--json", "--stop", "not there", "--stop", stop
    )
    ended_early = json.loads(outcome.out)
    assert ended_early["text"].endswith(stop)
    assert ended_early["tokens"] == whole["tokens"][: len(ended_early["tokens"])] != whole["tokens"]
    outcome = run("generate", PROMPT, *trio.options, "--stop", "")
    assert outcome.status == 2 and "'--stop': it needs at least one character" in outcome.err


def test_a_turn_of_a_chat_goes_through_the_tuned_models_template(
    run: Callable[..., Outcome], trio: Trio, tokenizer: Any, tmp_path: Path
) -> None:
    outcome = run("generate", PROMPT, *trio.options, "--chat")
    assert outcome.status == 2 and "'--chat': the tuned model's tokenizer has no chat template" in outcome.err
    tuned = shutil.copytree(trio.tuned, tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    with_template = Trio(trio.large, tuned, trio.base)
    record = json.loads(run("generate", "add", *with_template.options, *OPTIONS, "--chat", "--json").out)
    assert record["prompt"] == "add"
    assert ended(record["text"]) == run("generate", "add", *with_template.options, *OPTIONS, "--chat").out
    decoder = EFTDecoder(EFTModels.from_pretrained(*with_template.arguments))
    chat = [{"role": "user", "content": "add"}]
    given = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, "seed": 5}
    wanted: Any = decoder.generate(chat=chat, **given)
    bases = tokenizer("User: add\nAssistant:").input_ids
    assert wanted[0, : len(bases)].tolist() == bases
    assert record["tokens"] == wanted[0, len(bases) :].tolist()
    plain: Any = decoder.generate(torch.tensor([bases]), **given)
    assert record["tokens"] != plain[0, len(bases) :].tolist()


def test_models_and_decoder_are_made_where_compiling_is_told(
    run: Callable[..., Outcome], trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def told(*_: object) -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not events or events[-1] != name:
                events.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("speculative_eft.command_options.may_compile", told)
    monkeypatch.setattr("speculative_eft.cli.may_compile", told)
    monkeypatch.setattr(EFTDecoder, "__init__", noted("decoder", EFTDecoder.__init__))
    monkeypatch.setattr(
        "speculative_eft.models.runner.ModelRunner.__init__", noted("runner", ModelRunner.__init__)
    )
    assert run("generate", PROMPT, *trio.options, *OPTIONS, "--draft-weights", "own").status == 0
    assert events == ["begin", "runner", "end", "begin", "decoder", "end"]


def stream(tokens: list[int], tokenizer: Any, console: Console, show_sources: bool) -> None:
    streamer = SourceStreamer(tokenizer, tokenizer(PROMPT).input_ids, console, show_sources)
    streamer.put(torch.tensor([tokenizer(PROMPT).input_ids]))
    generator = random.Random(0)
    while tokens:
        count = generator.randint(1, 5)
        streamer.put_drafted(torch.tensor(tokens[:count]), count - 1)
        tokens = tokens[count:]
    streamer.end()


@pytest.mark.parametrize("seed", range(8))
def test_streamed_pieces_are_the_decoded_text(seed: int, tokenizer: Any) -> None:
    """Random tokens are mostly broken characters; the others are whole ones split over tokens."""
    generator = random.Random(seed)
    tokens = [generator.randrange(310) for _ in range(60)]
    tokens += tokenizer("Größe → 尺寸 🙂 naïve\n    x").input_ids + tokenizer("🙂").input_ids[: seed % 4]
    console = Console(file=io.StringIO(), force_terminal=False)
    stream(tokens, tokenizer, console, show_sources=False)
    assert console.file.getvalue() == ended(tokenizer.decode(tokens, skip_special_tokens=True))


def test_no_broken_character_is_shown_on_the_way(tokenizer: Any) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    streamer = SourceStreamer(tokenizer, [], console, show_sources=False)
    streamer.put(torch.tensor([[]]))
    for token in tokenizer("a🙂é").input_ids:
        streamer.put_drafted(torch.tensor([token]), 0)
        assert "\ufffd" not in console.file.getvalue()
    assert console.file.getvalue() == "a🙂é"


def test_colours_on_a_terminal_are_all_that_is_added(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokens = tokenizer("def add(first, second):\n\treturn 1  \n").input_ids
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=20)
    assert has_colours(console)
    stream(tokens, tokenizer, console, show_sources=True)
    shown = console.file.getvalue()
    assert "\x1b[32m" in shown
    assert ESCAPE.sub("", shown) == tokenizer.decode(tokens)


def test_sources_without_colours_are_marked(tokenizer: Any) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    tokens = tokenizer("def add(first, second):\n").input_ids
    stream(tokens, tokenizer, console, show_sources=True)
    shown = console.file.getvalue()
    assert "«" in shown and shown.replace("«", "").replace("»", "") == tokenizer.decode(tokens)


@pytest.mark.parametrize("decoder_kind", [EFTDecoder, NaiveEFTDecoder])
@pytest.mark.parametrize(
    "options",
    [
        {"stop_strings": ["e", "t", "a", "\n"]},
        {"eos_token_id": list(range(1, 320, 6))},
        {"stop_strings": ["e", "t", "a", "\n"], "eos_token_id": list(range(1, 320, 9))},
        {},
    ],
    ids=["stop", "end", "both", "length"],
)
@pytest.mark.parametrize("processed", [False, True], ids=["fused", "general"])
def test_sources_that_are_shown_are_those_of_the_trace(
    decoder_kind: type[EFTDecoder], options: dict[str, Any], processed: bool, trio: Trio, tokenizer: Any
) -> None:
    decoder = decoder_kind(EFTModels.from_pretrained(*trio.arguments), EFTConfig(draft_tokens=5))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    if processed:
        options = {**options, "repetition_penalty": 1.01}
    ends = []
    for seed in range(20):
        console = Console(file=io.StringIO(), force_terminal=False)
        streamer = SourceStreamer(tokenizer, ids[0].tolist(), console, show_sources=True)
        found = continue_prompt(
            decoder, tokenizer, ids, seed, 1.0, streamer, max_new_tokens=17, top_k=0, **options
        )
        ends.append(found.sources[-1])
        looks = [LOOKS["draft" if source == "draft" else "target"] for source in found.sources]
        pieces = zip(found.pieces, [*looks, looks[-1]], strict=True)
        assert console.file.getvalue() == ended("".join(marked(piece, look) for piece, look in pieces))
    # What ends a sequence before its greatest length cuts rounds within their drafts.
    if "stop_strings" in options or "eos_token_id" in options:
        assert ("draft" in ends) == (decoder_kind is EFTDecoder)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Console(file=io.StringIO(), force_terminal=True))
