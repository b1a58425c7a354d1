"""What a model's configuration says about running it, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

TESTED_FAMILIES = frozenset({
    "falcon", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2",
    "opt", "phi3", "qwen2", "qwen3",
})  # fmt: skip
"""Values of `config.model_type` whose runner the tests compare with the plain model."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the text decoder."""
    return config.get_text_config(decoder=True)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layer a model has, and the sliding window of each (None: full attention).

    Raises ValueError for a kind whose state is not a list of keys and values.
    """
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"full_attention": sliding}
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": sliding}
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise ValueError(
            f"{config.model_type} models have {' and '.join(unknown)} layers, whose state cannot be rolled "
            "back when a draft is rejected"
        )
    return {kind: known[kind] for kind in sorted(set(kinds))}


def position_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model supports, None if there is no limit.

    A model whose rotation changes with the length of the input (`changes_with_length`) is held to the
    lengths at which it does not, so that a sequence never depends on its neighbours in the batch.
    """
    if getattr(config, "alibi", False):
        return None
    limits = [getattr(config, "max_position_embeddings", None)]
    for rope in _ropes(config):
        if _is(rope, "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=None)


def changes_with_length(config: PreTrainedConfig) -> bool:
    """Whether transformers chooses the frequencies of the rotation by the longest input of a batch."""
    return any(_is(rope, "longrope") or _is(rope, "dynamic") for rope in _ropes(config))


def _is(rope: dict[str, Any], kind: str) -> bool:
    return kind in str(rope.get("rope_type", ""))


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The settings of each rotation: one for the model, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in settings:
        yield settings
    else:
        yield from (value for value in settings.values() if isinstance(value, dict))
