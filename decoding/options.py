"""The generation options of a call, resolved as transformers resolves them, and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation.configuration_utils import BaseWatermarkingConfig

from speculative_eft.kernels import Sampling, batch_sampling, usable_temperature

from .checks import between, int64_of, integer, token_ids
from .fields import FIELDS, OTHER_ARGUMENTS, is_neutral

__all__ = ["GenerationOptions", "read_options"]

# transformers' own defaults for options nobody set; top_k=50 in sampling is one of them.
_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "return_dict_in_generate": False,
    "use_cache": True,
    "num_return_sequences": 1,
}
_DEFAULT_NEW_TOKENS = 20
_BOOLEANS = (
    "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores", "output_logits",
    "return_dict_in_generate", "disable_compile",
)  # fmt: skip
_COUNTS = (
    "max_length", "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
)  # fmt: skip
# Least and largest values of what transformers' classes take as floats.
_REALS: dict[str, tuple[float, float]] = {
    "repetition_penalty": (math.ulp(0.0), math.inf),
    "encoder_repetition_penalty": (math.ulp(0.0), math.inf),
    "typical_p": (math.ulp(0.0), 1),
    "top_h": (math.ulp(0.0), 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
}


@dataclass(frozen=True)
class GenerationOptions:
    """The generation options of one call, resolved.

    Attributes:
        max_new_tokens: most tokens to generate a sequence, at least 1.
        temperature: 0 for greedy decoding.
        top_k: 0 keeps all tokens.
        eos_token_ids: any of them ends a sequence; may be empty.
        pad_token_id: fills rows that ended early.
        marks_padding: whether the pad token counts as padding in prompts without a mask.
        bos_token_id: begins a sequence where no prompt is given, or None.
        num_return_sequences: continuations of each prompt.
        stop_strings, max_time: end a sequence as transformers' criteria of these names do.
        prefill_chunk_size: tokens of a prompt that run at a time, None for the default.
        general: names of the options that the fused path does not know.
        config: everything resolved, for transformers' own classes; `max_length` includes the prompt.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    marks_padding: bool
    return_dict_in_generate: bool
    bos_token_id: int | None
    num_return_sequences: int
    stop_strings: tuple[str, ...]
    max_time: float | None
    use_cache: bool
    output_scores: bool
    output_logits: bool
    prefill_chunk_size: int | None
    general: tuple[str, ...]
    config: GenerationConfig

    def sampling(self, batch: int, vocab_size: int, temperature: float, device: torch.device) -> Sampling:
        """These options for every sequence of a batch, at the given temperature."""
        return batch_sampling(
            [temperature] * batch,
            [self.top_k] * batch,
            [self.top_p] * batch,
            [self.min_p] * batch,
            vocab_size,
            device,
        )


def read_options(
    generation_config: GenerationConfig | None,
    keywords: Mapping[str, Any],
    model_configs: Sequence[GenerationConfig],
    prompt_width: int,
) -> GenerationOptions:
    """Resolve options: keywords, then the call's config, then the large model's, then the defaults.

    As in transformers a keyword counts also when it is None, which takes the option back, while None in a
    config leaves it to the next.

    Args:
        model_configs: the models' own generation configs, the large base's first. Unless the call names
            end-of-sequence tokens, those of all models end a sequence.
        prompt_width: columns of `input_ids`, which `max_length` includes, padding too.

    Raises:
        ValueError: naming an option that is unknown, out of range, or not supported.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}; give "
            "options as keywords"
        )
    known = {*FIELDS, *vars(GenerationConfig())}  # type: ignore[no-untyped-call]
    for name in keywords:
        if name in OTHER_ARGUMENTS:
            raise ValueError(f"{name} is not supported: {OTHER_ARGUMENTS[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name} is not a generation option{hint}")
    asked = {} if generation_config is None else _set_fields(generation_config)
    asked.update(keywords)
    own = _set_fields(model_configs[0]) if model_configs else {}
    values = {**_DEFAULTS, **own, **asked}
    for name, value in values.items():
        # What equals the model's own value was not asked for: transformers fills a call's config with it.
        _refuse(name, value, name in asked and str(value) != str(own.get(name)))

    _check_values(values)
    eos_token_ids = _end_tokens(asked, model_configs)
    values["max_new_tokens"] = max_new_tokens = _new_tokens(values, prompt_width)
    do_sample = bool(values["do_sample"])
    temperature = between("temperature", _or(values["temperature"], 1.0), 0, math.inf)
    temperature = usable_temperature(temperature) if do_sample else 0.0
    values.update(
        temperature=temperature,
        do_sample=temperature > 0,
        top_k=integer("top_k", _or(values["top_k"], 0)),
        top_p=between("top_p", _or(values["top_p"], 1.0), 0, 1),
        min_p=between("min_p", _or(values["min_p"], 0.0), 0, 1),
        eos_token_id=list(eos_token_ids) or None,
        max_length=prompt_width + max_new_tokens,
    )
    copies = integer("num_return_sequences", _or(values["num_return_sequences"], 1), least=1)
    if copies > 1 and temperature == 0:
        raise ValueError(
            f"num_return_sequences={copies} needs do_sample=True: greedy decoding would give the same "
            "continuation every time"
        )
    for name in ("pad_token_id", "bos_token_id"):
        token = values.get(name)
        values[name] = int64_of(token)
        if token is not None and (values[name] is None or values[name] < 0):
            # Some models' own configs say -1 for none.
            if name in asked and token != own.get(name):
                raise ValueError(f"{name} must be a token id, got {token!r}")
            values[name] = None
    pad = values.get("pad_token_id")
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_p=values["min_p"],
        eos_token_ids=eos_token_ids,
        pad_token_id=pad if pad is not None else (eos_token_ids[0] if eos_token_ids else 0),
        # As transformers has it, which knows the large model alone: that a token ends a turn of the tuned one
        # says nothing of prompts.
        marks_padding=pad is not None and pad not in _end_tokens(asked, model_configs[:1]),
        return_dict_in_generate=bool(values["return_dict_in_generate"]),
        bos_token_id=values.get("bos_token_id"),
        num_return_sequences=copies,
        stop_strings=_stop_strings(values.get("stop_strings")),
        max_time=_seconds(values.get("max_time")),
        use_cache=values["use_cache"] is not False,
        output_scores=bool(values.get("output_scores")) and bool(values["return_dict_in_generate"]),
        output_logits=bool(values.get("output_logits")) and bool(values["return_dict_in_generate"]),
        prefill_chunk_size=_chunk(values.get("prefill_chunk_size")),
        general=_general_options(values, prompt_width),
        config=_processing_config(values, prompt_width),
    )


def _set_fields(config: GenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and (name in FIELDS or not name.startswith("_"))
    }


def _refuse(name: str, value: Any, is_asked: bool) -> None:
    """Raise ValueError for what no path honours.

    What a model's own config says of other decoding methods is let pass: plain decoding does not read it.
    """
    field = FIELDS.get(name)
    if field is None:
        if is_asked:
            raise ValueError(
                f"{name}={value!r} is not supported: this version of speculative-eft does not know it; leave "
                "it at None"
            )
    elif field.path == "refused" and not is_neutral(name, value) and (is_asked or not field.elsewhere):
        raise ValueError(f"{name}={value!r} is not supported: {field.why}")


def _check_values(values: dict[str, Any]) -> None:
    """Raise ValueError for values of the wrong kind; whole numbers become floats where those are meant."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in _BOOLEANS:
        if given.get(name, False) not in (True, False):
            raise ValueError(f"{name} must be True or False, got {given[name]!r}")
    for name in _COUNTS:
        integer(name, given.get(name, 0))
    for name, (low, high) in _REALS.items():
        if name in given:
            values[name] = between(name, given[name], low, high)
    decay = given.get("exponential_decay_length_penalty")
    if decay is not None:
        if not isinstance(decay, Sequence) or len(decay) != 2:
            raise ValueError(
                f"exponential_decay_length_penalty must be a pair (first token, factor), got {decay!r}"
            )
        integer("the start of exponential_decay_length_penalty", decay[0])
        between("the factor of exponential_decay_length_penalty", decay[1], 0, math.inf)
    watermark = given.get("watermarking_config")
    if watermark is not None and not isinstance(watermark, dict | BaseWatermarkingConfig):
        raise ValueError(
            "watermarking_config must be a WatermarkingConfig, a SynthIDTextWatermarkingConfig or a "
            f"dictionary, got {type(watermark).__name__}"
        )


def _end_tokens(asked: Mapping[str, Any], model_configs: Sequence[GenerationConfig]) -> tuple[int, ...]:
    named = [asked["eos_token_id"]] if "eos_token_id" in asked else [c.eos_token_id for c in model_configs]
    return tuple(dict.fromkeys(token for value in named for token in token_ids("eos_token_id", value)))


def _new_tokens(values: Mapping[str, Any], prompt_width: int) -> int:
    new, length = values.get("max_new_tokens"), values.get("max_length")
    if new is None and length is not None:
        new = integer("max_length", length) - prompt_width
        if new < 1:
            raise ValueError(
                f"max_length={length} leaves no room after {prompt_width} prompt tokens; raise it, or set "
                "max_new_tokens"
            )
    return integer("max_new_tokens", _or(new, _DEFAULT_NEW_TOKENS), least=1)


def _general_options(values: Mapping[str, Any], prompt_width: int) -> tuple[str, ...]:
    """The names of the options that the fused path does not know and that change something."""
    no_end = values["eos_token_id"] is None
    without_effect = {
        "min_length": no_end or _or(values.get("min_length"), 0) <= prompt_width,
        "min_new_tokens": no_end,
        "exponential_decay_length_penalty": no_end,
        "output_scores": not values["return_dict_in_generate"],
        "output_logits": not values["return_dict_in_generate"],
        "forced_bos_token_id": prompt_width != 1,
    }
    return tuple(
        name
        for name, field in FIELDS.items()
        if field.path == "general"
        and not is_neutral(name, values.get(name))
        and not without_effect.get(name, False)
        and (values["do_sample"] or not field.sampling)
    )


def _processing_config(values: Mapping[str, Any], prompt_width: int) -> GenerationConfig:
    config = GenerationConfig()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if name in FIELDS and FIELDS[name].path != "record":
            setattr(config, name, value)
    if isinstance(config.watermarking_config, dict):
        read: Any = WatermarkingConfig.from_dict
        config.watermarking_config = read(config.watermarking_config)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt_width
    config.num_beams = 1
    return config


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings must be a string or a list of strings, none empty, got {value!r}")
    return tuple(strings)


def _seconds(value: Any) -> float | None:
    return None if value is None else between("max_time", value, 0, math.inf)


def _chunk(value: Any) -> int | None:
    return None if value is None else integer("prefill_chunk_size", value, least=1)
