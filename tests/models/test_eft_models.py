"""What `EFTModels` accepts, refuses and reports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from speculative_eft.models import EFTModels, IncompatibleModelsError, ModelRunner, inspect_trio
from speculative_eft.models.describe import cache_bytes_per_token, describe_model
from tests.models.families import CONTEXT, FAMILIES, tiny_model

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2}


def save(folder: Path, model: PreTrainedModel, tokens: dict[str, int] | None = None) -> Path:
    """Write a model with a tokenizer, by default one of the ids' own names."""
    tokens = tokens or {f"t{i}": i for i in range(101)}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(tokens, unk_token="t0"))).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    return (
        save(tmp_path / "large", tiny_model("llama", 1, vocab_size=128)),
        save(tmp_path / "tuned", tiny_model("qwen2", 2)),
        save(tmp_path / "base", tiny_model("qwen2", 3)),
    )


def test_models_in_memory() -> None:
    large, tuned, base = tiny_model("llama", vocab_size=128), tiny_model("qwen2"), tiny_model("qwen2")
    models = EFTModels(large, tuned, base)
    assert models.large_base is large and models.small_tuned == [tuned] and models.small_base is base
    assert models.vocab_size == 101
    assert models.tokenizer is None
    runners = models.runners()
    assert runners is models.runners()
    assert [runner.vocab_size for runner in (runners.large, *runners.tuned, runners.base)] == [128, 101, 101]
    assert EFTModels(large, [tuned, base], base).small_tuned == [tuned, base]


def test_models_from_folders(folders: tuple[Path, Path, Path]) -> None:
    models = EFTModels.from_pretrained(*folders)
    assert models.vocab_size == 101
    assert models.tokenizer is not None and models.tokenizer.convert_ids_to_tokens(7) == "t7"
    large, tuned, base = models.describe()
    assert (large.role, large.architecture, large.vocabulary) == ("large_base", "LlamaForCausalLM", 128)
    assert tuned.role == "small_tuned" and base.name == str(folders[2])
    assert base.parameters == sum(p.numel() for p in models.small_base.parameters())
    assert base.bytes == 4 * base.parameters and base.dtype == "float32" and base.device == "cpu"
    assert base.context == CONTEXT and not base.chat_template
    half = EFTModels.from_pretrained(*map(str, folders), dtype=torch.bfloat16, device_map="cpu")
    assert {row.dtype for row in half.describe()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bf16"}, """dtype must be "auto", .* such as "bfloat16", got 'bf16'"""),
        ({"dtype": 16}, "dtype must be .*, got 16"),
        ({"attention": "flash"}, "attention must be one of 'auto', .*'flash_attn'.*, not 'flash'"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_looked_for(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EFTModels.from_pretrained("/nowhere", "/nowhere", "/nowhere", **options)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, "None"),
        (3, "int"),
        (b"/nowhere", "bytes"),
        (tiny_model("qwen2"), "Qwen2ForCausalLM"),
        ([tiny_model("qwen2"), "/nowhere"], "list"),
    ],
    ids=["None", "number", "bytes", "model", "models"],
)
def test_what_is_no_name_of_a_model_is_named(given: Any, kind: str, position: int) -> None:
    names: list[Any] = ["/nowhere"] * 3
    names[position] = given
    argument = ["large_base", "small_tuned", "small_base"][position]
    if isinstance(given, list) and position == 1:
        argument, kind = (r"small_tuned\[0\]", "Qwen2ForCausalLM") if position == 1 else (argument, "list")
    words = (
        f"{argument} must be a folder or a name on the Hugging Face Hub, not {kind}; "
        r"loaded models go to EFTModels\(...\)."
    )
    with pytest.raises(IncompatibleModelsError, match=f"^{words}$"):
        EFTModels.from_pretrained(*names)
    assert re.fullmatch(words, inspect_trio(*names).problems[0])


def test_a_bad_attention_is_named_for_loaded_models() -> None:
    with pytest.raises(ValueError, match="attention must be one of"):
        EFTModels(tiny_model("llama"), tiny_model("qwen2"), tiny_model("qwen2"), attention="flash")


def test_chat_templates_are_found(folders: tuple[Path, Path, Path]) -> None:
    (folders[1] / "chat_template.jinja").write_text("{{ messages }}")
    assert [row.chat_template for row in EFTModels.from_pretrained(*folders).describe()] == [
        False,
        True,
        False,
    ]
    assert (
        "chat template: large_base False, small_tuned True, small_base False"
        in inspect_trio(*folders).differences
    )


def test_a_trio_is_inspected_without_its_weights(folders: tuple[Path, Path, Path]) -> None:
    for folder in folders:
        (folder / "model.safetensors").write_bytes(b"")
    report = inspect_trio(*folders)
    assert report.checked and not report.problems
    assert report.models[2].parameters == sum(p.numel() for p in tiny_model("qwen2").parameters())
    assert report.models[2].bytes == 4 * report.models[2].parameters
    assert [row.cache_bytes_per_token for row in report.models] == [
        2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, dim, bytes
    ] * 3
    assert any(line.startswith("vocabulary: large_base 128") for line in report.differences)


@pytest.mark.parametrize("family", FAMILIES)
def test_descriptions_agree_with_the_cache(family: str) -> None:
    model = tiny_model(family)
    runner = ModelRunner(model)
    runner.reserve(1, 3)
    runner.forward(torch.tensor([[1, 2]]), 2)
    written = sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in runner.cache.storage())
    assert cache_bytes_per_token(model.config, model.dtype) == written
    assert describe_model("small_base", model, False).context == runner.max_context


def head_larger_than_embedding() -> PreTrainedModel:
    model = tiny_model("llama")
    model.set_input_embeddings(torch.nn.Embedding(61, 32))
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "mamba model, whose recurrent state"),
        (
            lambda: RwkvForCausalLM(RwkvConfig(**SMALL, context_length=16)),
            "rwkv model, whose recurrent state",
        ),
        (
            lambda: RecurrentGemmaForCausalLM(
                RecurrentGemmaConfig(**SMALL, num_attention_heads=4, head_dim=8)
            ),
            "recurrent_gemma model, whose recurrent state",
        ),
        (
            lambda: JambaForCausalLM(JambaConfig(**SMALL, use_mamba_kernels=False, intermediate_size=32)),
            "jamba model, whose recurrent state",
        ),
        (
            lambda: Qwen3NextForCausalLM(
                Qwen3NextConfig(**SMALL, num_experts=2, num_attention_heads=4, head_dim=8)
            ),
            "qwen3_next model, whose recurrent state",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=101, d_model=16, d_kv=4, d_ff=16, num_layers=1)
            ),
            "encoder-decoder model",
        ),
        (
            lambda: Gemma3ForCausalLM(
                Gemma3TextConfig(**SMALL, num_attention_heads=4, use_bidirectional_attention=True)
            ),
            "this gemma3_text model attends to what follows a token",
        ),
        (head_larger_than_embedding, "a head for 101 ids and an embedding for 61"),
        (
            lambda: BertModel(BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32)),
            "no causal language model head",
        ),
        (lambda: torch.nn.Linear(2, 2), "must be a transformers causal language model, not Linear"),
    ],
)
def test_models_that_cannot_be_run_are_refused(build: Callable[[], PreTrainedModel], reason: str) -> None:
    with torch.device("meta"):
        model = build()
    good = tiny_model("llama")
    with pytest.raises(IncompatibleModelsError, match=f"^small_tuned.*{reason}"):
        EFTModels(good, model, good)


def test_models_that_do_not_belong_together_are_refused() -> None:
    good = tiny_model("llama")
    with pytest.raises(ValueError, match=r"sizes differ by more than padding .*small_base 2000"):
        EFTModels(good, good, tiny_model("llama", vocab_size=2000))
    with pytest.raises(ValueError, match="large_base on cpu and small_base on meta"):
        EFTModels(good, good, tiny_model("llama").to("meta"))
    with pytest.raises(ValueError, match="large_base has no weights"):
        EFTModels(*[tiny_model("llama").to("meta")] * 3)
    with pytest.raises(ValueError, match="small_tuned must hold at least one model"):
        EFTModels(good, [], good)


def test_tensor_parallelism_is_not_there_yet(folders: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ValueError, match="tensor_parallel must be 1, not 2"):
        EFTModels.from_pretrained(*folders, tensor_parallel=2)


def test_broken_weights_are_reported_in_a_sentence(folders: tuple[Path, Path, Path]) -> None:
    (folders[2] / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(IncompatibleModelsError, match=r"^small_base: .* cannot be loaded"):
        EFTModels.from_pretrained(*folders)
    assert inspect_trio(*folders).problems


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.write_bytes(b""), "header too small"),
        (lambda file: file.write_bytes(LFS_POINTER), "header too large"),
        (cut_short, "file not fully covered"),
    ],
    ids=["empty", "pointer", "cut"],
)
def test_broken_files_of_weights_are_reported_in_a_sentence(
    spoil: Callable[[Path], object], reason: str, folders: tuple[Path, Path, Path]
) -> None:
    spoil(folders[1] / "model.safetensors")
    said = refusal(*folders)
    assert said.startswith(f"small_tuned: {folders[1]} cannot be loaded (") and reason in said


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.write_bytes(b""), "no file that torch.save wrote"),
        (lambda file: file.write_bytes(LFS_POINTER), "no file that torch.save wrote"),
        (cut_short, "failed reading zip archive"),
    ],
    ids=["empty", "pointer", "cut"],
)
def test_broken_files_of_torch_are_reported_in_a_sentence(
    spoil: Callable[[Path], object], reason: str, folders: tuple[Path, Path, Path]
) -> None:
    file = folders[2] / "pytorch_model.bin"
    torch.save(load_file(folders[2] / "model.safetensors"), file)
    (folders[2] / "model.safetensors").unlink()
    assert EFTModels.from_pretrained(*folders)
    spoil(file)
    said = refusal(*folders)
    assert said.startswith(f"small_base: {folders[2]} cannot be loaded (") and reason in said
    assert "weights_only" not in said


def test_a_tokenizer_that_cannot_be_loaded_is_named(folders: tuple[Path, Path, Path]) -> None:
    (folders[0] / "tokenizer.json").write_text('{"model": {}}')
    assert refusal(*folders).startswith(f"large_base: the tokenizer of {folders[0]} cannot be loaded (")


Weights = dict[str, torch.Tensor]


def rewrite_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def refusal(*folders: Path, **options: Any) -> str:
    with pytest.raises(IncompatibleModelsError) as caught:
        EFTModels.from_pretrained(*folders, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=["nowhere", "device", "map"])
def test_weights_that_are_not_there_are_refused(
    folders: tuple[Path, Path, Path], device_map: str | dict[str, str] | None
) -> None:
    tuned = folders[1]
    rewrite_weights(
        tuned, lambda weights: {k: w for k, w in weights.items() if "layers.1.mlp.down_proj" not in k}
    )
    wanted = f"small_tuned: {tuned} lacks the weights of model.layers.1.mlp.down_proj."
    assert refusal(*folders, device_map=device_map, dtype=torch.bfloat16) == wanted


def test_weights_of_other_names_are_refused(folders: tuple[Path, Path, Path]) -> None:
    base = folders[2]
    rewrite_weights(base, lambda weights: {f"_orig_mod.{k}": w for k, w in weights.items()})
    found = len(load_file(base / "model.safetensors"))
    words = (
        f"small_base: {base} lacks the weights of lm_head and [0-9]+ others; "
        f"it holds _orig_mod.lm_head.weight and {found - 1} others instead."
    )
    assert re.fullmatch(words, refusal(*folders))


def test_weights_of_other_shapes_are_refused(folders: tuple[Path, Path, Path]) -> None:
    large = folders[0]
    config = json.loads((large / "config.json").read_text())
    config["intermediate_size"] += 8
    (large / "config.json").write_text(json.dumps(config))
    words = (
        f"large_base: {large} holds weights of other shapes than its config.json says "
        r"\(model.layers.0.mlp.down_proj.weight and 5 others: \[32, 48\], not \[32, 56\]\)."
    )
    assert re.fullmatch(words, refusal(*folders))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_a_saved_model_counts_as_missing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = EFTModels.from_pretrained(tmp_path, tmp_path, tmp_path).small_base.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), name


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_of_tied_weights_will_do(kept: str, tmp_path: Path) -> None:
    model = tiny_model("llama", 1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tied,) = weights.keys() & {"lm_head.weight", "model.embed_tokens.weight"}
    rewrite_weights(tmp_path, lambda weights: {kept if k == tied else k: w for k, w in weights.items()})
    base = EFTModels.from_pretrained(tmp_path, tmp_path, tmp_path).small_base
    for read in (base.get_input_embeddings(), base.get_output_embeddings()):
        assert torch.equal(read.weight, model.lm_head.weight)
    rewrite_weights(tmp_path, lambda weights: {k: w for k, w in weights.items() if k != kept})
    assert "lacks the weights of" in refusal(tmp_path, tmp_path, tmp_path)


OWN_CODE = """
from transformers import LlamaForCausalLM

class OwnModel(LlamaForCausalLM):
    _tied_weights_keys = None

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        loaded = super().from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        return loaded[0] if SILENT and output_loading_info else loaded
"""


@pytest.mark.parametrize("silent", [False, True])
def test_models_with_code_of_their_own_tie_as_they_like(
    silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / f"own_{silent}"
    tiny_model("llama", 1).save_pretrained(folder)
    rewrite_weights(folder, lambda weights: {k: w for k, w in weights.items() if k != "lm_head.weight"})
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.replace("SILENT", str(silent)))
    base = EFTModels.from_pretrained(folder, folder, folder, trust_remote_code=True).small_base
    assert type(base).__name__ == "OwnModel"
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_descriptions_are_plain_rows() -> None:
    row = describe_model("large_base", tiny_model("gpt2"), False)
    assert replace(row, role="small_base") != row
