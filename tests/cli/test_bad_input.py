"""Bad input: one clear line, exit status 2, no traceback, and at once where no model is needed."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file

from speculative_eft.cli import main
from speculative_eft.command_options import check_writable

from .conftest import CONTEXT, Outcome, Trio, byte_tokenizer, save_model

COMMAND = "import sys; from speculative_eft.cli import main; sys.exit(main())"
SECONDS = 3.0


def processor_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_process(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run in a new interpreter, and its processor time, which a busy machine does not stretch."""
    start = processor_seconds_of_children()
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        # Python adds the folder it is started in to its path: not the repository's.
        cwd="/",
        timeout=60,
    )
    return process, processor_seconds_of_children() - start


def assert_quick_error(arguments: list[str], *words: str) -> None:
    process, seconds = run_process(COMMAND, *arguments)
    assert_one_line(Outcome(process.returncode, process.stdout, process.stderr), *words)
    assert seconds < SECONDS


def assert_one_line(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("speculative-eft: error: ")
    assert outcome.err.count("\n") == 1 and outcome.err.endswith("\n")
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--draft-tokens", "0", "x"], ["--draft-tokens", "at least 1"]),
        (["generate", "--beta", "nan", "x"], ["--beta", "nan", "at most 1e+30"]),
        (["generate", "--large", "/nowhere", "x"], ["--large", "/nowhere"]),
        (["bench", "--project", "lama2-70b/llama-2-7b"], ["--project", "lama2-70b"]),
    ],
)
def test_answers_at_once(arguments: list[str], words: list[str]) -> None:
    assert_quick_error(arguments, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--draft-tokens", "many", "x"], ["--draft-tokens", "auto"]),
        (["generate", "--draft-tokens", "4097", "x"], ["--draft-tokens", "at most 4096", "auto"]),
        (["demo", "--draft-tokens", "5000"], ["--draft-tokens", "at most 4096"]),
        (["bench", "--draft-tokens", "2", "--draft-tokens", "5000"], ["--draft-tokens", "at most 4096"]),
        (["generate", "--alpha", "inf", "x"], ["--alpha", "inf", "at most 1e+30"]),
        (["generate", "--alpha", "1", "--alpha", "1e39", "x"], ["--alpha", "1e+39", "at most 1e+30"]),
        (["generate", "--beta", "-1e39", "x"], ["--beta", "-1e+39", "at least -1e+30"]),
        (["bench", "--alpha", "1e39"], ["--alpha", "at most 1e+30"]),
        (["bench", "--beta", "1", "--beta", "1e39"], ["--beta", "at most 1e+30"]),
        (["generate", "--alpha", "1", "--alpha", "2", "x"], ["--alpha", "2 values: give one"]),
        (["generate", "--acceptance", "luck", "x"], ["--acceptance", "block"]),
        (["generate", "--draft", "none", "x"], ["--draft", "pair"]),
        (["generate", "--draft-weights", "int4", "x"], ["--draft-weights", "int8"]),
        (["generate", "--dtype", "int8", "x"], ["--dtype", "bfloat16"]),
        (["generate", "--temperature", "-1", "x"], ["--temperature", "at least 0"]),
        (["generate", "--temperature", "nan", "x"], ["--temperature", "finite"]),
        (["generate", "--draft-temperature", "0", "x"], ["--draft-temperature", "above 0"]),
        (["generate", "--conservative-top-p", "0", "x"], ["--conservative-top-p", "above 0"]),
        (["generate", "--top-p", "1.5", "x"], ["--top-p", "at most 1"]),
        (["generate", "--min-p", "nan", "x"], ["--min-p"]),
        (["generate", "--top-k", "-1", "x"], ["--top-k"]),
        (["generate", "--max-new-tokens", "0", "x"], ["--max-new-tokens"]),
        (["generate", "--seed", str(2**63), "x"], ["--seed", "64 bits"]),
        (["generate", ""], ["PROMPT", "empty"]),
        (["generate"], ["empty"]),
        (["generate", "--file", "/nowhere"], ["--file", "/nowhere"]),
        (["generate", "--file", __file__, "x"], ["not both"]),
        (["generate", "--large", "gpt2", "x"], ["all three"]),
        (["generate", "--device-map", "cuda:99", "x"], ["cuda:99"]),
        (["bench", "--simulate-acceptance", "0.9", "--device", "cuda:99"], ["cuda:99"]),
        (["generate", "--tuned", "./nowhere", "x"], ["--tuned", "./nowhere"]),
        (["generate", "--sead", "1", "x"], ["--sead", "--seed"]),
        (["generate", "x", "y"], ["y"]),
        (["demo", "--temperature", "inf"], ["--temperature", "finite"]),
        (["demo", "--prompts", "0"], ["--prompts"]),
        (["demo", "--json", "/nowhere/results.json"], ["--json", "/nowhere"]),
        # A folder in which nobody can write, where there is one.
        (["demo", "--json", "/proc/results.json"], ["--json", "/proc"]),
        (["bench", "--output", "/proc/results"], ["--output", "/proc"]),
        (["check", "/nowhere", "b", "c"], ["LARGE", "/nowhere"]),
        (["check", "a"], ["Missing"]),
        (["check", "--batch", "0", "a", "b", "c"], ["--batch"]),
        (["conjure"], ["conjure"]),
        (["--unknown"], ["--unknown"]),
    ],
    ids=" ".join,
)
def test_one_line(run: Callable[..., Outcome], arguments: list[str], words: list[str]) -> None:
    assert_one_line(run(*arguments), *words)


def test_a_prompt_is_asked_for_where_standard_input_was_closed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(Outcome(main(["generate"]), *capsys.readouterr()), "give a prompt, --file")


def test_a_prompt_must_be_utf8(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff")
    assert_one_line(run("generate", "--file", str(tmp_path / "prompt")), "UTF-8")


def test_a_folder_without_weights(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.large, tmp_path / "large")
    (tmp_path / "large" / "model.safetensors").unlink()
    options = Trio(tmp_path / "large", trio.tuned, trio.base).options
    assert_quick_error(["generate", *options, "x"], "large_base", "weights")


def test_a_file_of_weights_cut_short(run: Callable[..., Outcome], trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.tuned, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    options = Trio(trio.large, tmp_path / "tuned", trio.base).options
    assert_one_line(run("generate", *options, "x"), "small_tuned", str(tmp_path), "not fully covered")


def test_weights_that_are_not_there(run: Callable[..., Outcome], trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.tuned, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({f"_orig_mod.{k}": w for k, w in load_file(file).items()}, file, {"format": "pt"})
    options = Trio(trio.large, tmp_path / "tuned", trio.base).options
    assert_one_line(run("generate", *options, "x"), "small_tuned", "lacks the weights of", "_orig_mod.")


def test_another_tokenizer(trio: Trio, tmp_path: Path) -> None:
    other = save_model(tmp_path / "base", byte_tokenizer("select * from a where b is null; " * 9), 2, 16)
    options = Trio(trio.large, trio.tuned, other).options
    assert_quick_error(["generate", *options, "x"], "small_base", "tokenizer")


def test_a_recurrent_model(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.base, tmp_path / "base")
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 320}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    options = Trio(trio.large, trio.tuned, tmp_path / "base").options
    assert_quick_error(["generate", *options, "x"], "small_base", "recurrent")


def test_a_prompt_longer_than_the_context(run: Callable[..., Outcome], trio: Trio) -> None:
    assert_one_line(run("generate", *trio.options, "x" * (CONTEXT + 1)), "context", str(CONTEXT))


def test_an_id_beyond_the_vocabulary(run: Callable[..., Outcome], trio: Trio) -> None:
    assert_one_line(run("generate", *trio.options, "<|beyond|>"), "320", "vocabulary")


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--version"], 0), (["generate", "--help"], 0), (["generate", ""], 2)]
)
def test_answers_without_torch(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from speculative_eft.cli import main; "
        "status = main(); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    process, _ = run_process(code, *arguments)
    assert process.returncode == status, process.stderr


def test_ctrl_c_is_quiet(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("speculative_eft.cli.load_models", interrupt)
    assert run("generate", "x") == Outcome(130, "", "")


INTERRUPTED_IMPORT = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from speculative_eft.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_during_the_first_imports_is_quiet() -> None:
    process, _ = run_process(INTERRUPTED_IMPORT)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\nspeculative-eft = "speculative_eft.__main__:main"\n' in pyproject


def test_trying_to_write_leaves_files_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    check_writable(file)
    assert not file.exists()
    file.write_text("kept")
    check_writable(file)
    assert file.read_text() == "kept"
    with pytest.raises(typer.BadParameter, match="cannot be written"):
        check_writable(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b"{}"])
def test_what_is_no_report_is_named(run: Callable[..., Outcome], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    assert_one_line(run("bench", "compare", str(file), str(file)), "report.json")
