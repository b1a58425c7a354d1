"""Generated text on a console: decoded token by token, and coloured by where each token came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = [
    "LOOKS",
    "Look",
    "TokenText",
    "has_colours",
    "marked",
    "source_counts",
    "styled_pieces",
    "token_pieces",
]

_CONTEXT_TOKENS = 6


@dataclass(frozen=True)
class Look:
    """How tokens of one source appear.

    Attributes:
        meaning: for a legend.
        style: rich's, where there are colours.
        marks: put around the token where there are none.
    """

    meaning: str
    style: str
    marks: tuple[str, str]


LOOKS = {
    "draft": Look("drafted", "green", ("", "")),
    "residual": Look("residual", "bold yellow", ("«", "»")),
    "bonus": Look("bonus", "bold cyan", ("⟨", "⟩")),
    "target": Look("residual or bonus", "bold yellow", ("«", "»")),
}
"""By `EFTTrace.source`; "target" is for a stream, which does not know what ended a round."""


def has_colours(console: Console) -> bool:
    """Whether styles show on `console`."""
    return console.is_terminal and not console.no_color and console.color_system is not None


class TokenText:
    """Turns tokens into text one by one; the pieces put together are the whole decoded text.

    A character may span several tokens: its piece comes with the last of them. Special tokens give none.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        # Some tokenizers drop a leading space, so the first new token is decoded behind the prompt's last.
        self._tokenizer = tokenizer
        self._tokens = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._start = 0
        self._shown = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        self._tokens.append(token)
        return self._new_text(at_end=False)

    def finish(self) -> str:
        """What an incomplete character at the end decodes to, "" if there is none."""
        return self._new_text(at_end=True)

    def _new_text(self, at_end: bool) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        text = self._decode(self._tokens[self._start :])
        if text == before or (text.endswith("\ufffd") and not at_end):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def styled_pieces(pieces: Iterable[tuple[str, str]], colours: bool) -> Text:
    """Pieces of (text, source) as one text, in colours or between marks."""
    text = Text()
    for piece, source in pieces:
        look = LOOKS[source]
        if colours:
            text.append(piece, look.style)
        elif piece:
            text.append(marked(piece, look))
    return text


def source_counts(sources: Sequence[str], colours: bool) -> Text:
    """How many tokens came from where, in the looks of their sources, as a legend."""
    names = [name for name in LOOKS if name in sources]
    parts = [
        styled_pieces([(f"{sources.count(name)} {LOOKS[name].meaning}", name)], colours) for name in names
    ]
    return Text(" · ").join(parts)


def marked(piece: str, look: Look) -> str:
    """`piece` between marks, line breaks and indentation around it left outside."""
    body = piece.strip()
    if not body or not look.marks[0]:
        return piece
    start = piece.index(body)
    return f"{piece[:start]}{look.marks[0]}{body}{look.marks[1]}{piece[start + len(body) :]}"


def token_pieces(tokenizer: Any, prompt_ids: Sequence[int], tokens: Sequence[int]) -> Iterator[str]:
    """The text of each token, and what is left after the last: one piece more than tokens."""
    text = TokenText(tokenizer, prompt_ids)
    for token in tokens:
        yield text.push(token)
    yield text.finish()
