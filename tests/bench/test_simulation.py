"""Models of random weights: where configurations come from, and what is refused before any are drawn."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from speculative_eft.bench import simulation
from speculative_eft.bench.simulation import random_models

TINY = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def write(folder: Path, **changes: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return str(folder)


@pytest.fixture
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = simulation.random_model

    def without_weights(*arguments: Any) -> Any:
        assert torch.empty(0).device.type == "meta"
        return drawn(*arguments)

    monkeypatch.setattr(simulation, "random_model", without_weights)


def test_configurations_need_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, wide = write(tmp_path / "small"), write(tmp_path / "large", hidden_size=32, dtype="bfloat16")
    files = [SimpleNamespace(rfilename="config.json")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file: str(tmp_path / "small" / file))
    models = random_models(wide, ["some/model"], folder, "auto", None)
    assert [model.config.name_or_path for model in models.small_tuned] == ["some/model"]
    assert models.large_base.dtype == torch.bfloat16 and models.small_base.dtype == torch.float32
    assert models.large_base.config.hidden_size == 32 and models.vocab_size == 40
    weights = [model.model.embed_tokens.weight for model in (*models.small_tuned, models.small_base)]
    assert not torch.equal(*weights)


@pytest.mark.usefixtures("nothing_is_drawn")
def test_a_silent_hub_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    refusal = pytest.raises(
        ValueError, match=r"^--large: 'lama' is not a folder, .* Nor is it one of llama-2-7b"
    )
    with refusal:
        random_models("lama", ["lama-2", "llama-2-7b"], "lama-3", "auto", None)
    assert time.monotonic() - start < 15


@pytest.mark.usefixtures("nothing_is_drawn")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 5000}, ("--large", "40", "--tuned", "5000", "more than padding")),
        ({"model_type": "mamba"}, ("--tuned is a mamba model",)),
        ({"model_type": "no such"}, ("--tuned: the configuration of", "cannot be read")),
        ({"model_type": "vit"}, ("--tuned: no model can be made of",)),
    ],
    ids=lambda value: str(next(iter(value))),
)
def test_what_cannot_work_is_refused_before_weights_are_drawn(
    changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", **changes)
    with pytest.raises(ValueError) as refused:
        random_models(good, [bad], good, "auto", None)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    good = write(tmp_path / "good")
    with pytest.raises(ValueError, match=r"^--base: .* has no config.json"):
        random_models(good, [good], str(tmp_path), "auto", None)
