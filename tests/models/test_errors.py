"""What is said of an error in one line."""

from __future__ import annotations

import pytest

from speculative_eft.models.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no file\nnor a name"), "no file"),
        (ValueError("\n  two rows\n"), "two rows"),
        (OSError(), "OSError"),
        (AssertionError("  \n"), "AssertionError"),
    ],
    ids=["several lines", "blank before", "no message", "blanks alone"],
)
def test_the_first_line_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line
