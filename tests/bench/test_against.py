"""Two processes of which one works while the other waits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from speculative_eft.bench.against import inherited_line, other_version

OTHER = """
import sys
from pathlib import Path

from speculative_eft.bench.against import inherited_line

log, turns, status = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
line = inherited_line()
for turn in range(turns):
    with log.open("a") as file:
        print(f"other {turn}", file=file)
    line.give_way()
sys.exit(status)
"""


def program(folder: Path) -> str:
    """OTHER as a program of its own; it takes a file for its log, its turns and its status."""
    file = folder / "other"
    file.write_text(f"#!{sys.executable}\n{OTHER}")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(("others", "log"), [(2, "other 0, own 0, other 1, own 1, own 2"), (4, None)])
def test_two_processes_take_turns(tmp_path: Path, others: int, log: str | None) -> None:
    file = tmp_path / "log"
    with other_version(program(tmp_path), [str(file), str(others), "0"]) as line:
        for turn in range(3):
            with file.open("a") as opened:
                print(f"own {turn}", file=opened)
            line.give_way()
    if log is None:
        # Who has more to do goes on alone.
        log = "other 0, own 0, other 1, own 1, other 2, own 2, other 3"
    assert ", ".join(file.read_text().splitlines()) == log


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_program_that_fails_is_told_whenever_it_does(tmp_path: Path, turns: int) -> None:
    with (
        pytest.raises(ValueError, match="ended with status 3"),
        other_version(program(tmp_path), [str(tmp_path / "log"), str(turns), "3"]) as line,
    ):
        line.give_way()


def test_a_program_that_takes_no_turn_is_refused_unless_it_is_done(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "log"), "0", "0"]
    refusal = pytest.raises(ValueError, match=r"^--against: .*other ended before its first turn")
    with refusal, other_version(program(tmp_path), arguments):
        pytest.fail("a turn began")
    with other_version(program(tmp_path), arguments, is_done=True) as line:
        line.give_way()


def test_a_program_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    file = tmp_path / "other"
    file.write_bytes(b"\x7fELF")
    file.chmod(0o755)
    refusal = pytest.raises(ValueError, match=r"^--against: .*other cannot be started \(Exec format error\)")
    with refusal, other_version(str(file), []):
        pytest.fail("it was started")


def test_an_exception_ends_the_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), other_version(program(tmp_path), [str(log), "9", "0"]):
        raise KeyboardInterrupt
    assert log.read_text() == "other 0\n"


def test_a_process_by_itself_has_no_line() -> None:
    assert inherited_line() is None
