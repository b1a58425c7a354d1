"""The wheel installs one package and nothing beside it, and works away from the checkout and in its root."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import speculative_eft

ROOT = Path(__file__).parent.parent

FIVE_LINES = """
from speculative_eft import EFTDecoder, EFTModels
models = EFTModels.demo()
inputs = models.tokenizer("def total(values):\\n", return_tensors="pt")
output = EFTDecoder(models).generate(**inputs, max_new_tokens=16, do_sample=True, seed=0)
print(models.tokenizer.decode(output[0]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked as an installer does it: a folder to stand in for site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Builds share the folder build/, and so may pytest's workers.
    with FileLock(Path(tempfile.gettempdir()) / "speculative-eft-wheel.lock"):
        subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_installed(installed: Path, *arguments: str) -> str:
    # -P and the path put the unpacked wheel before the editable installation.
    # Compiling what Numba's cache does not have there would take a minute and a half.
    environment = {**os.environ, "PYTHONPATH": str(installed), "SPECULATIVE_EFT_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_one_package_at_the_top(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"speculative_eft"}
    assert (installed / "speculative_eft" / "py.typed").exists()
    recipe = installed / "speculative_eft" / "decoding" / "recipe" / "custom_generate" / "generate.py"
    assert recipe.exists()
    for role in ("large_base", "small_tuned", "small_base"):
        weights = installed / "speculative_eft" / "models" / "demo" / "weights" / role
        assert list(weights.glob("*.safetensors"))
        assert (weights / "tokenizer.json").exists()


def test_every_module_and_the_version_are_in_it(installed: Path) -> None:
    package = installed / "speculative_eft"
    for folder in ("speculative_eft", "kernels", "models", "decoding", "bench"):
        home = package if folder == "speculative_eft" else package / folder
        modules = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        # The suites of `make bench` are run from a checkout.
        missing = {path for path in modules if path.parts[0] != "suites" and not (home / path).exists()}
        assert not missing
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {speculative_eft.__version__}\n" in metadata.read_text()


def test_the_five_lines_of_python_run_from_it(installed: Path) -> None:
    where = "import speculative_eft as s; print(s.__file__)\n"
    located, *text = run_installed(installed, "-c", where + FIVE_LINES).splitlines()
    assert Path(located).is_relative_to(installed)
    assert text[0].startswith("def total(values):")


def test_the_hubs_kernels_package_stays_visible(installed: Path) -> None:
    pytest.importorskip("kernels", reason="the Hub's kernels package is not installed")
    code = "import kernels, speculative_eft.kernels; print(kernels.__file__)"
    for folder in (installed, ROOT):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        assert not Path(done.stdout.strip()).is_relative_to(ROOT / "kernels")


# As where the package is not installed in editable mode, whose finder would know the sub-packages' places.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def run_in_the_checkout(code: str, *paths: Path, options: tuple[str, ...] = ()) -> str:
    """What `python -c` prints that is started in the checkout's root, which is then first on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "SPECULATIVE_EFT_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["", "from transformers import LlamaForCausalLM\n"])
def test_python_started_in_the_checkout_finds_all_of_it(installed: Path, first: str) -> None:
    where = "import speculative_eft.decoding as d, kernels as k; print(d.__file__); print(k.__file__)\n"
    pytest.importorskip("kernels", reason="the Hub's kernels package is not installed")
    printed = run_in_the_checkout(WITHOUT_EDITABLE + first + FIVE_LINES + where, installed).splitlines()
    assert printed[0].startswith("def total(values):")
    assert printed[-2] == str(ROOT / "decoding" / "__init__.py")
    assert not Path(printed[-1]).is_relative_to(ROOT / "kernels")


def test_the_checkouts_kernels_stand_aside_for_another_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .part import name\n")
    (tmp_path / "kernels" / "part.py").write_text("name = 'the other'\n")
    # Without site-packages, where the Hub's may be.
    code = "import kernels, kernels.part; print(kernels.name, kernels.part.name)"
    assert run_in_the_checkout(code, tmp_path, options=("-S",)) == "the other the other\n"
    # What transformers takes for no package.
    assert run_in_the_checkout("import kernels; print(kernels.__file__)", options=("-S",)) == "None\n"
