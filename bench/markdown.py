"""Tables in Markdown, and the parts of pages that are made of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table", "with_part"]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def with_part(page: str, name: str, part: str) -> str:
    """A page with what stands between `<!-- name: begin -->` and `<!-- name: end -->` made anew."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"
