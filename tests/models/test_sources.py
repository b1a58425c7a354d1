"""Folders and names are looked at before anything is loaded, quickly and in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from speculative_eft.models import IncompatibleModelsError, find_sources
from speculative_eft.models.sources import VOCABULARY_PADDING, token_differences

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 10}


def write_model(
    folder: Path,
    config: dict[str, Any] = LLAMA,
    tokens: str | list[list[Any]] | None = "abcdefghij",
    added: list[dict[str, Any]] | None = None,
) -> Path:
    """A folder that looks like a saved model; `tokens` are its vocabulary in order."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    if tokens is not None:
        vocabulary = {token: i for i, token in enumerate(tokens)} if isinstance(tokens, str) else tokens
        contents = {"model": {"vocab": vocabulary}, "added_tokens": added or []}
        (folder / "tokenizer.json").write_text(json.dumps(contents))
    return folder


def refusal(*names: Any) -> str:
    start = time.monotonic()
    with pytest.raises(IncompatibleModelsError) as caught:
        find_sources(*names)
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_are_found(tmp_path: Path) -> None:
    good = write_model(tmp_path / "good")
    sources = find_sources(good, [str(good), good], good)
    assert [source.argument for source in sources] == [
        "large_base",
        "small_tuned[0]",
        "small_tuned[1]",
        "small_base",
    ]
    assert {source.location for source in sources} == {str(good)}
    assert all(source.has_tokenizer and not source.has_chat_template for source in sources)


def test_folders_that_are_not_models_are_refused(tmp_path: Path) -> None:
    good, empty = write_model(tmp_path / "good"), tmp_path / "empty"
    empty.mkdir()
    assert refusal(good, good, empty) == f"small_base: {empty} has no config.json, so it is no saved model."
    bare = write_model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert refusal(bare, good, good).startswith(f"large_base: {bare} has no weights")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    (bare / "model-1.safetensors").write_bytes(b"")
    assert refusal(good, bare, good) == f"small_tuned: {bare} lacks the weight file model-2.safetensors."
    assert "is a file" in refusal(good, good, bare / "config.json")
    (bare / "model-2.safetensors").write_bytes(b"")
    (bare / "config.json").write_text("{")
    assert refusal(good, bare, good).startswith(f"small_tuned: cannot read {bare / 'config.json'}")
    assert refusal(good, [], good) == "small_tuned must name at least one model."


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds no object but a list"),
        ("{}", "it has no weight_map from weights to files"),
        ('{"weight_map": ["model.safetensors"]}', "it has no weight_map from weights to files"),
        ('{"weight_map": {"a": 1}}', "it has no weight_map from weights to files"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(contents: str, reason: str, tmp_path: Path) -> None:
    good, bad = write_model(tmp_path / "good"), write_model(tmp_path / "bad")
    index = bad / "model.safetensors.index.json"
    index.write_text(contents)
    assert refusal(good, [good, bad], good).startswith(f"small_tuned[1]: cannot read {index} ({reason}")


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ("[]", "it holds no object but a list"),
        ('{"model": []}', "it is not as tokenizers writes it: AttributeError"),
        ('{"model": {"vocab": 3}}', "it is not as tokenizers writes it: TypeError"),
        ('{"model": {"vocab": {"a": "b"}}}', "it is not as tokenizers writes it: ValueError"),
        ('{"model": {"vocab": [[]]}}', "it is not as tokenizers writes it: IndexError"),
        ('{"added_tokens": [{}]}', "it is not as tokenizers writes it: KeyError"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(contents: str, reason: str, tmp_path: Path) -> None:
    good, bad = write_model(tmp_path / "good"), write_model(tmp_path / "bad")
    (bad / "tokenizer.json").write_text(contents)
    wanted = f"small_base: cannot read {bad / 'tokenizer.json'} ({reason}"
    assert refusal(good, good, bad).startswith(wanted)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_configuration_that_is_no_object_is_refused(name: str, tmp_path: Path) -> None:
    good, bad = write_model(tmp_path / "good"), write_model(tmp_path / "bad")
    (bad / "adapter_model.safetensors").write_bytes(b"")
    (bad / name).write_text("[]")
    wanted = f"small_tuned: cannot read {bad / name} (it holds no object but a list)."
    assert refusal(good, bad, good) == wanted


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nothing", "~/nothing", "a/b/c", "a b/c", "x\\y"])
def test_paths_that_lead_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    good = write_model(tmp_path / "good")
    assert refusal(good, good, name) == f"small_base: there is no folder {name!r}."


def fail_to_connect(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("no route to host")


def never_answer(*args: Any, **kwargs: Any) -> None:
    time.sleep(30)


@pytest.mark.parametrize("ask", [fail_to_connect, never_answer])
def test_names_are_refused_when_the_hub_is_silent(
    ask: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "model_info", ask)
    good = write_model(tmp_path / "good")
    assert "small_tuned: 'some/model' is not a folder, and the Hugging Face Hub cannot be reached" in refusal(
        good, "some/model", "other/model"
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "is a mamba model, whose recurrent state cannot be rolled back"),
        ({**LLAMA, "layer_types": ["full_attention", "linear_attention"]}, "recurrent state"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model head"),
        ({**LLAMA, "vocab_size": 5000}, "sizes differ by more than padding"),
    ],
)
def test_configurations_that_cannot_work_are_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good, bad = write_model(tmp_path / "good"), write_model(tmp_path / "bad", config)
    message = refusal(good, bad, good)
    assert "small_tuned" in message and reason in message


def test_tokenizers_must_agree(tmp_path: Path) -> None:
    good = write_model(tmp_path / "good")
    other = write_model(tmp_path / "other", tokens="abcdefghji")
    assert refusal(good, good, other) == (
        "small_base has another tokenizer than large_base (id 8 is 'j', not 'i'); "
        "the models must share one tokenizer."
    )


def test_a_special_token_is_no_ordinary_one_of_another_name(tmp_path: Path) -> None:
    good = write_model(tmp_path / "good")
    special = write_model(tmp_path / "special", added=[{"id": 9, "content": "<end>", "special": True}])
    assert "(id 9 is '<end>', not 'j')" in refusal(good, special, good)
    assert "(id 9 is 'j', not '<end>')" in refusal(special, special, good)


def test_sizes_may_differ_by_all_of_padding(tmp_path: Path) -> None:
    good = write_model(tmp_path / "good")
    padded = write_model(tmp_path / "padded", {**LLAMA, "vocab_size": 10 + VOCABULARY_PADDING})
    assert len(find_sources(padded, good, good)) == 3
    beyond = write_model(tmp_path / "beyond", {**LLAMA, "vocab_size": 11 + VOCABULARY_PADDING})
    assert "sizes differ by more than padding" in refusal(beyond, good, good)


def test_tokenizers_may_differ_where_it_does_no_harm(tmp_path: Path) -> None:
    special = [{"id": 9, "content": "<end>", "special": True}]
    renamed = [
        {"id": 9, "content": "<turn>", "special": True},
        {"id": 10, "content": "<new>", "special": True},
    ]
    good = write_model(tmp_path / "good", added=special)
    tuned = write_model(tmp_path / "tuned", {**LLAMA, "vocab_size": 16}, added=renamed)
    unigram = write_model(tmp_path / "unigram", tokens=[[token, -1.0] for token in "abcdefghi"])
    silent = write_model(tmp_path / "silent", tokens=None)
    sources = find_sources(good, [tuned, unigram], silent)
    assert not sources[-1].has_tokenizer
    assert token_differences(sources) == [
        "small_base has no tokenizer.json",
        "small_tuned[0] has 1 more tokens than large_base",
        "small_tuned[0] has 1 special tokens of another name than large_base",
        "small_tuned[1] has 1 fewer tokens than large_base",
    ]


def write_adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "bias": "none", **settings}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_adapters_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_model(tmp_path / "good")
    bare = write_adapter(tmp_path / "bare")
    _, tuned, base = find_sources(good, bare, good)
    assert tuned.is_adapter and tuned.base == base and not base.is_adapter
    assert tuned.config == LLAMA and tuned.tokenizer_source == base and tuned.location == str(bare)

    on_hub = write_adapter(tmp_path / "hub", init_lora_weights="gaussian")
    (on_hub / "tokenizer.json").write_text((good / "tokenizer.json").read_text())
    files = [SimpleNamespace(rfilename=path.name) for path in on_hub.iterdir()]
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(on_hub / file))
    _, tuned, base = find_sources(good, "some/adapter", good)
    assert tuned.is_adapter and tuned.folder is None and tuned.config == LLAMA
    assert tuned.tokenizer_source == tuned and tuned.has_tokenizer


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "is of type IA3; only LoRA adapters can be run"),
        ({"bias": "lora_only"}, "changes the base itself (bias='lora_only')"),
        ({"init_lora_weights": "olora"}, "changes the base itself (init_lora_weights='olora')"),
        ({"layer_replication": [[0, 2]]}, "changes the base itself (layer_replication)"),
    ],
)
def test_adapters_that_cannot_work_are_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good, adapter = write_model(tmp_path / "good"), write_adapter(tmp_path / "adapter", **settings)
    assert refusal(good, adapter, good).startswith(f"small_tuned: {adapter} {reason}")
    assert refusal(good, good, adapter) == (
        f"small_base: {adapter} is an adapter; give the model that it was trained on."
    )
    (adapter / "adapter_model.safetensors").unlink()
    assert "but no adapter_model.safetensors" in refusal(good, adapter, good)


def test_looking_needs_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, speculative_eft.models.demo, speculative_eft.models.sources; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("set()\n", "")
