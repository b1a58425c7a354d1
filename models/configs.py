"""What a model's configuration says about running it, before any weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

TESTED_FAMILIES = frozenset({
    "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo2", "olmo3", "opt", "phi3", "qwen2", "qwen3",
})  # fmt: skip
"""Values of `config.model_type` whose runner the tests compare with the plain model."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the text decoder."""
    return config.get_text_config(decoder=True)


def declared(config: PreTrainedConfig, name: str) -> Any:
    """What `config` says of `name`; None where its class knows no such setting, whatever a file may hold.

    A key that stands in a config.json by chance is kept by transformers and read by no model. Some classes
    have another name for a setting: GPT-2 reads `n_positions` for `max_position_embeddings`.
    """
    kind: Any = type(config)
    return getattr(config, name, None) if _knows(kind, name) else None


@cache
def _knows(kind: Any, name: str) -> bool:
    own = kind.attribute_map.get(name, name)
    return hasattr(kind, own) or own in inspect.signature(kind.__init__).parameters


def longest_window(config: PreTrainedConfig) -> int:
    """The largest number that `config` gives for a window of any name, 0 without one."""
    numbers = (value for name, value in config.to_dict().items() if "window" in name)
    return max((value for value in numbers if type(value) is int), default=0)


def logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its head's logits by: Cohere has a factor, Granite a divisor."""
    factor, divisor = declared(config, "logit_scale"), declared(config, "logits_scaling")
    # MPT may have the name of a rule, or None, and does not read it.
    return (factor if isinstance(factor, int | float) else 1.0) / (1.0 if divisor is None else divisor)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layer a model has, and the sliding window of each (None: full attention).

    Raises ValueError for a kind whose state is not a list of keys and values, and for attention both ways.
    """
    if declared(config, "use_bidirectional_attention") is True:
        raise ValueError(f"this {config.model_type} model attends to what follows a token")
    sliding = declared(config, "sliding_window")
    kinds = declared(config, "layer_types")
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
    if declared(config, "alibi"):
        return None
    limits = [declared(config, "max_position_embeddings")]
    for rope in _ropes(config):
        if _is(rope, "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=None)


def changes_with_length(config: PreTrainedConfig) -> bool:
    """Whether transformers chooses the frequencies of the rotation by the longest input of a batch."""
    return any(_is(rope, "longrope") or _is(rope, "dynamic") for rope in _ropes(config))


def rotates_whole_heads(config: PreTrainedConfig) -> bool:
    """Whether the rotation turns all of each head's numbers."""
    shares = [declared(config, "partial_rotary_factor")]
    shares += [rope.get("partial_rotary_factor") for rope in _ropes(config)]
    return all(share in (None, 1) for share in shares)


def _is(rope: dict[str, Any], kind: str) -> bool:
    return kind in str(rope.get("rope_type", ""))


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The settings of each rotation: one for the model, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in settings:
        yield settings
    else:
        yield from (value for value in settings.values() if isinstance(value, dict))
