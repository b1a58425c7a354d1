"""One call of `generate`, checked: prompts, limits and sampling parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from speculative_eft.kernels import Sampling, derive_seeds

__all__ = ["GenerationOptions", "Prompts", "read_options", "read_prompts", "read_seeds"]

# transformers' own defaults for options nobody set; top_k=50 in sampling is one of them.
_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "return_dict_in_generate": False,
    "use_cache": True,
}
_DEFAULT_NEW_TOKENS = 20
_READ = frozenset(_DEFAULTS) | {
    "max_length",
    "max_new_tokens",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
}
# Values that ask for what happens anyway; any other value of an option outside _READ is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "early_stopping": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "low_memory": (False,),
    "use_mtp": (False,),
}
# Bookkeeping of the class and settings of other decoding methods: without effect on plain decoding.
_WITHOUT_EFFECT = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "is_assistant",
        "disable_compile",
        "compile_config",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "decoder_start_token_id",
        "continuous_batching_config",
    }
)


@dataclass(frozen=True)
class GenerationOptions:
    """The generation options this decoder reads, resolved.

    Attributes:
        max_new_tokens: most tokens to generate a sequence, at least 1.
        temperature: 0 for greedy decoding.
        top_k: 0 keeps all tokens.
        eos_token_ids: any of them ends a sequence; may be empty.
        pad_token_id: fills rows that ended early.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    return_dict_in_generate: bool

    def sampling(self, batch: int, vocab_size: int, temperature: float, device: torch.device) -> Sampling:
        """These options for every sequence of a batch, at the given temperature."""

        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        greedy = temperature == 0
        filters = not greedy
        return Sampling(
            temperature=column(temperature),
            top_k=column(self.top_k, torch.int64) if filters and 0 < self.top_k < vocab_size else None,
            top_p=column(self.top_p) if filters and self.top_p < 1 else None,
            min_p=column(self.min_p) if filters and self.min_p > 0 else None,
            any_greedy=greedy,
            all_greedy=greedy,
        )


def read_options(
    generation_config: GenerationConfig | None,
    keywords: Mapping[str, Any],
    model_configs: Sequence[GenerationConfig],
    prompt_width: int,
) -> GenerationOptions:
    """Resolve options: keywords, then the call's config, then the large model's, then the defaults.

    Args:
        model_configs: the models' own generation configs, the large base's first. Unless the call names
            end-of-sequence tokens, those of all models end a sequence.
        prompt_width: columns of `input_ids`, which `max_length` includes, padding too.

    Raises:
        ValueError: naming an option that is unknown, out of range, or not supported.
    """
    known = set(GenerationConfig().__dict__) | _READ  # type: ignore[no-untyped-call]
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name} is not a generation option{hint}")
    asked = [dict(keywords)] + ([] if generation_config is None else [generation_config.to_dict()])
    values: dict[str, Any] = {}
    for layer in (*asked, *(config.to_dict() for config in model_configs[:1]), _DEFAULTS):
        for name, value in layer.items():
            if value is not None:
                values.setdefault(name, value)
    for name, value in values.items():
        if name in _READ or name in _WITHOUT_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        raise ValueError(
            f"{name}={value!r} is not supported; the supported options are {', '.join(sorted(_READ))}"
        )

    sources = [layer for layer in asked if layer.get("eos_token_id") is not None][:1]
    ends = [source["eos_token_id"] for source in sources] or [config.eos_token_id for config in model_configs]
    eos_token_ids = tuple(dict.fromkeys(token for value in ends for token in _token_ids(value)))
    max_new_tokens = values.get("max_new_tokens")
    if max_new_tokens is None and "max_length" in values:
        max_new_tokens = _integer("max_length", values["max_length"]) - prompt_width
        if max_new_tokens < 1:
            raise ValueError(
                f"max_length={values['max_length']} leaves no room after {prompt_width} prompt tokens; "
                "raise it, or set max_new_tokens"
            )
    elif max_new_tokens is None:
        max_new_tokens = _DEFAULT_NEW_TOKENS
    if _integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    pad = values.get("pad_token_id")
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=_between("temperature", values["temperature"], 0, math.inf)
        if values["do_sample"]
        else 0.0,
        top_k=_integer("top_k", values["top_k"]),
        top_p=_between("top_p", values["top_p"], 0, 1),
        min_p=_between("min_p", values["min_p"], 0, 1),
        eos_token_ids=eos_token_ids,
        pad_token_id=pad if pad is not None else (eos_token_ids[0] if eos_token_ids else 0),
        return_dict_in_generate=bool(values["return_dict_in_generate"]),
    )


def _token_ids(value: int | Iterable[int] | Tensor | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return (value,) if isinstance(value, int) else tuple(value)


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return value


def _between(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Prompts:
    """Prompts without their padding, right-padded with 0.

    Attributes:
        tokens: int64 [batch, longest prompt].
        lengths: int64 [batch], at least 1.
        longest: the longest prompt's length, known to the host.
    """

    tokens: Tensor
    lengths: Tensor
    longest: int


def read_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, name: str = "input_ids"
) -> Prompts:
    """Check prompts and left-align them.

    Args:
        input_ids: integers [batch, width].
        attention_mask: [batch, width], 0 where `input_ids` is padding; None where nothing is.
        vocab_size: ids at or above it are refused.
        name: what to call `input_ids` in an error.

    Raises:
        ValueError: for a wrong shape or type, an empty prompt, or an id beyond the vocabulary.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"{name} must be an integer tensor of shape [batch, length]")
    batch, width = input_ids.shape
    if batch == 0 or width == 0:
        raise ValueError(f"{name} is empty; every prompt needs at least one token")
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} does not match {name} of shape "
            f"{list(input_ids.shape)}"
        )
    else:
        mask = attention_mask.to(input_ids.device) != 0
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    if int(lengths.min()) == 0:
        raise ValueError(f"{name} has a prompt without tokens; every prompt needs at least one")
    # A stable sort moves the real tokens of each row to its left in their order.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    tokens = (input_ids.to(torch.int64) * mask).gather(1, order)[:, :longest].contiguous()
    for bound in (int(tokens.min()), int(tokens.max())):
        if not 0 <= bound < vocab_size:
            raise ValueError(f"{name} holds the id {bound}, outside the vocabulary of {vocab_size} ids")
    return Prompts(tokens, lengths, longest)


def read_seeds(seed: int | Sequence[int] | None, batch: int) -> Tensor:
    """The seed of each sequence: int64 [batch], on the CPU.

    Args:
        seed: an int (sequence i gets a seed derived from it and i), one int a sequence, or None to draw
            one from torch's default generator.

    Raises:
        ValueError: for another type, a wrong count, or a value beyond 64 bits.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    seeds = [seed] if isinstance(seed, int) else seed
    if (
        not isinstance(seeds, Sequence)
        or isinstance(seeds, str)
        or not all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in seeds)
    ):
        raise ValueError(f"seed must be an int of 64 bits, one such int a sequence, or None, got {seed!r}")
    if isinstance(seed, int):
        return derive_seeds(seed, batch)
    if len(seeds) != batch:
        raise ValueError(f"seed has {len(seeds)} values for {batch} sequences")
    return torch.tensor(seeds, dtype=torch.int64)
