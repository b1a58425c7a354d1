"""One prompt continued for the command line: streamed to a console, and told as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from torch import Tensor

from .console_text import LOOKS, TokenText, has_colours, marked, token_pieces
from .decoding import Chat, EFTDecoder, EFTOutput, EFTStats, EFTTrace, Streamer

__all__ = ["Continuation", "SourceStreamer", "continue_prompt"]


class SourceStreamer:
    """Takes each round's tokens and writes their text at once, as transformers' streamers do.

    For calls that have a trace, which tells how many of the tokens were drafted.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], console: Console, show_sources: bool
    ) -> None:
        """Write to `console`; with `show_sources` in colours, or between marks where it has none."""
        self._text = TokenText(tokenizer, prompt_ids)
        self._console = console
        self._show_sources = show_sources
        self._colours = has_colours(console)
        self._last_source = "target"
        self._at_line_start = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is not written."""

    def put_drafted(self, value: Tensor, drafted: int) -> None:
        """Take a round's tokens, int64 [count], and how many of them, the first ones, were drafted."""
        for index, token in enumerate(value.tolist()):
            self._last_source = "draft" if index < drafted else "target"
            self._write(self._text.push(token), self._last_source)
        self._console.file.flush()

    def end(self) -> None:
        """Write what is left, which the last token began, and end the line."""
        self._write(self._text.finish(), self._last_source)
        if not self._at_line_start:
            self._console.file.write("\n")
        self._console.file.flush()

    def _write(self, piece: str, source: str) -> None:
        if not piece:
            return
        self._at_line_start = piece.endswith("\n")
        if not self._show_sources:
            self._console.file.write(piece)
        elif self._colours:
            # Not by the console, which expands tabs as if each piece began a line.
            style = Style.parse(LOOKS[source].style)
            self._console.file.write(style.render(piece, color_system=ColorSystem.STANDARD))
        else:
            self._console.file.write(marked(piece, LOOKS[source]))


@dataclass(frozen=True)
class Continuation:
    """What a prompt was continued with.

    Attributes:
        pieces: the text of each token, and what was left after the last.
        seconds: wall-clock, prefill included, but not what is measured once a machine.
    """

    tokens: list[int]
    pieces: list[str]
    stats: EFTStats
    trace: EFTTrace
    seconds: float

    @property
    def text(self) -> str:
        """The decoded tokens, without special ones."""
        return "".join(self.pieces)

    @property
    def sources(self) -> list[str]:
        """Where each token came from."""
        return self.trace.source[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain containers and numbers."""
        stats = self.stats
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "stats": {
                **asdict(stats),
                "acceptance_rate": stats.acceptance_rate,
                "tokens_per_round": stats.tokens_per_round,
                "large_calls_per_token": stats.large_calls_per_token,
            },
            "trace": {
                "source": self.sources,
                "large": self.trace.large[0].tolist(),
                "tuned": [tuned[0].tolist() for tuned in self.trace.tuned],
                "base": self.trace.base[0].tolist(),
                "target": self.trace.target[0].tolist(),
            },
        }


def continue_prompt(
    decoder: EFTDecoder,
    tokenizer: Any,
    input_ids: Tensor,
    seed: int,
    temperature: float,
    streamer: Streamer | None = None,
    chat: Chat | None = None,
    **generation_kwargs: Any,
) -> Continuation:
    """Continue one prompt, `input_ids` [1, length]; a temperature of 0 is greedy.

    With a `chat`, `input_ids` are what the bases are given of it.
    """
    output = decoder.generate(
        input_ids if chat is None else None,
        chat=chat,
        seed=seed,
        streamer=streamer,
        return_dict_in_generate=True,
        do_sample=True,
        temperature=temperature,
        **generation_kwargs,
    )
    assert isinstance(output, EFTOutput) and isinstance(output.sequences, Tensor)
    assert isinstance(output.stats, EFTStats) and isinstance(output.trace, EFTTrace)
    prompt_ids = input_ids[0].tolist()
    tokens = output.sequences[0, len(prompt_ids) :].tolist()
    pieces = list(token_pieces(tokenizer, prompt_ids, tokens))
    return Continuation(tokens, pieces, output.stats, output.trace, sum(output.stats.seconds.values()))
