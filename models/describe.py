"""What a model is and what it needs, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configs import declared, position_limit, text_config


@dataclass(frozen=True)
class ModelDescription:
    """One row: a model in its role."""

    role: str
    name: str
    """Folder or Hub name, empty for a model built in memory."""
    architecture: str
    parameters: int
    bytes: int
    """Memory of the weights; what models share counts for one of them."""
    dtype: str
    device: str
    """`"meta"` for a model that is not loaded."""
    context: int | None
    """Longest sequence, None if there is no limit."""
    vocabulary: int
    """Rows of the output head, padding included."""
    chat_template: bool
    cache_bytes_per_token: int
    """Keys and values of one token of one sequence."""

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, with a folder's own name without those above it."""
        return {**asdict(self), "name": Path(self.name).name}


def describe_model(
    role: str, model: PreTrainedModel, chat_template: bool, parameters: Sequence[nn.Parameter] | None = None
) -> ModelDescription:
    """Describe `model`, loaded or on the meta device; `parameters` are those to count, all for None."""
    config = text_config(model.config)
    parameters = list(model.parameters()) if parameters is None else parameters
    return ModelDescription(
        role=role,
        name=str(model.config.name_or_path),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        context=position_limit(config),
        vocabulary=vocabulary_rows(model),
        chat_template=chat_template,
        cache_bytes_per_token=cache_bytes_per_token(config, model.dtype),
    )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the output head, 0 if there is none."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # A quantised layer's weight has another shape than what it stands for.
    rows = getattr(head, "out_features", None)
    weight = getattr(head, "weight", None)
    return int(rows) if isinstance(rows, int) else 0 if weight is None else int(weight.shape[0])


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values in all layers."""
    heads = config.num_attention_heads
    kv_heads = declared(config, "num_key_value_heads") or heads
    if config.model_type == "falcon":  # grouped heads are written out one by one there
        kv_heads = 1 if config.multi_query and not config.new_decoder_architecture else heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim(config) * dtype.itemsize)


def head_dim(config: PreTrainedConfig) -> int:
    """Numbers of one attention head's key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
