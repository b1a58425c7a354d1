"""Quantised models and models that accelerate spreads: run by their own modules, with their own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels, IncompatibleModelsError, ModelRunner
from speculative_eft.models.llama import LlamaBody
from speculative_eft.models.placement import home_device

from ..tiny_models import perturbed, ragged_prompts
from .families import tiny_model


class Int8Linear(nn.Module):
    """A layer with 8-bit weights, one scale a row, as quantisation libraries put in a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))

    def forward(self, inputs: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        assert isinstance(self.weight, Tensor)
        return inputs @ (self.weight.to(inputs.dtype) * self.scale).T


def with_replaced_layers(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def with_torchao(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def offloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


def spread(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`device_map` with a layer on the disk, the one other place that a machine without a GPU has."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model.save_pretrained(folder / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map={**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"},
        offload_folder=str(folder / "offloaded"),
    )


WAYS: list[Callable[[PreTrainedModel, Path], PreTrainedModel]] = [
    with_replaced_layers, with_torchao, offloaded, spread
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_such_a_model_decodes_with_its_own_logits(
    way: Callable[[PreTrainedModel, Path], PreTrainedModel], tmp_path: Path
) -> None:
    large = way(perturbed(tiny_model("llama", 0), 1, 0.02), tmp_path)
    models = EFTModels(large, perturbed(tiny_model("llama", 0), 2, 0.02), tiny_model("llama", 0))
    assert not LlamaBody.fits(large.get_decoder())
    assert models.vocab_size == 101
    runner = ModelRunner(large)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        wanted = large(ids).logits
    runner.reserve(1, 8)
    runner.prefill(ids[:, :2], torch.tensor([2]))
    torch.testing.assert_close(runner.forward(ids[:, 2:], 5), wanted[:, 2:], atol=1e-4, rtol=0)
    prompts: dict[str, Any] = ragged_prompts(3)
    naive = NaiveEFTDecoder(models).generate(**prompts, max_new_tokens=10)
    assert torch.equal(
        EFTDecoder(models, EFTConfig(draft_tokens=3)).generate(**prompts, max_new_tokens=10), naive
    )


def test_device_map_auto(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    for role in ("large", "small"):
        tiny_model("llama", len(role)).save_pretrained(tmp_path / role)
    names = (tmp_path / "large", tmp_path / "small", tmp_path / "small")
    models = EFTModels.from_pretrained(*names, device_map="auto")
    output = EFTDecoder(models).generate(torch.tensor([[5, 6]]), max_new_tokens=4)
    assert torch.equal(
        output,
        EFTDecoder(EFTModels.from_pretrained(*names)).generate(torch.tensor([[5, 6]]), max_new_tokens=4),
    )


def test_a_models_home_is_where_its_embedding_runs() -> None:
    """Whatever its first parameter's place is; accelerate's hook says so where it moves the embedding."""
    embedding = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda:1")))
    model: Any = SimpleNamespace(get_input_embeddings=lambda: embedding, device=torch.device("cuda:0"))
    assert home_device(model) == torch.device("cuda:1")
    embedding._hf_hook = SimpleNamespace(execution_device="cuda:2")
    assert home_device(model) == torch.device("cuda:2")
    del embedding._hf_hook, embedding.weight
    assert home_device(model) == torch.device("cuda:0")


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        empty = tiny_model("llama", 0)
    with pytest.raises(IncompatibleModelsError, match="large_base has no weights"):
        EFTModels(empty, empty, empty)
