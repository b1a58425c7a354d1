"""The demo models themselves: their sizes, how they start, deepen, and are loaded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .data import CONTEXT, VOCABULARY

Size = Literal["large", "small"]


@dataclass(frozen=True)
class Shape:
    """What tells the two sizes apart; the rest of the configuration is common to them."""

    width: int
    layers: int
    heads: int
    inner: int


SIZES: dict[Size, Shape] = {
    "large": Shape(width=384, layers=8, heads=6, inner=1024),
    "small": Shape(width=256, layers=2, heads=4, inner=704),
}


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 for matrix products on a GPU; a CPU without AMX is faster in float32."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=device().type == "cuda")


def silence(layer: torch.nn.Module) -> None:
    """Make a decoder layer the identity: its two output projections become zero."""
    for name, weight in layer.named_parameters():
        if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            torch.nn.init.zeros_(weight)


def new_model(size: Size, end_id: int, layers: int) -> LlamaForCausalLM:
    """A fresh model, on the training device, whose layers start silent."""
    torch.manual_seed(0)
    shape = SIZES[size]
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        silence(layer)
    torch.nn.Module.to(model, device())
    return model


def deepened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function with twice the layers: after each layer comes a silent copy of it.

    A run that is short of compute sees more text when its first part is shallow.
    """
    config = deepcopy(model.config)
    config.num_hidden_layers *= 2
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        layer.load_state_dict(model.model.layers[index // 2].state_dict())
        if index % 2:
            silence(layer)
    torch.nn.Module.to(deep, device())
    return deep


def load(folder: Path) -> LlamaForCausalLM:
    """A trained model in float32 on the training device, in evaluation mode."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(model, device())
    torch.nn.Module.eval(model)
    return model


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits of shape (rows, positions, vocabulary) for ids of shape (rows, positions)."""
    with autocast():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
