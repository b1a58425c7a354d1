"""The decoder inside transformers: `generate(custom_generate=...)` as a function and as a folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

from speculative_eft.models import EFTModels

from .config import EFTConfig
from .fields import FIELDS
from .output import EFTOutput
from .past import CACHE_NAMES, EFTPast
from .processors import PrefixFunction

if TYPE_CHECKING:
    from .decoder import EFTDecoder

__all__ = ["CUSTOM_GENERATE_FOLDER", "continue_for_transformers", "generate_from_folder"]

CUSTOM_GENERATE_FOLDER = str(Path(__file__).parent / "recipe")
"""For `large.generate(..., custom_generate=CUSTOM_GENERATE_FOLDER, trust_remote_code=True, ...)`."""

# What transformers makes for a plain model and a round does not need.
_UNREAD = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "synced_gpus", *CACHE_NAMES}


def continue_for_transformers(
    decoder: EFTDecoder,
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[LogitsProcessor],
    stopping_criteria: Sequence[StoppingCriteria],
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    **arguments: Any,
) -> Tensor | EFTOutput:
    """What transformers' `generate` calls with everything prepared for a plain model; see `EFTDecoder`.

    Processors and criteria that `generate` made of the config are made again, for the target: its ends of
    sequence are those of all models. The caller's own are told from them by their type and settings.
    """
    _check_is_large_base(model, decoder)
    mask = model_kwargs.get("attention_mask")
    past = next((model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs), None)
    _check_model_kwargs(model_kwargs, input_ids, mask, past)
    make: Any = model._get_logits_processor
    made = make(
        generation_config=generation_config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        logits_processor=[],
        device=input_ids.device,
        model_kwargs={"attention_mask": mask},
    )
    own, prefix_function = _own_processors(logits_processor, made)
    config = copy.copy(generation_config)
    # Its criterion, which has been counting since `generate` was called, is among those kept.
    config.max_time = None
    taken_back = _taken_back(config)
    own_ends = model.generation_config.eos_token_id
    if _as_set(config.eos_token_id) == _as_set(own_ends):
        config.eos_token_id = None
        taken_back.pop("eos_token_id", None)
    kept = [criterion for criterion in stopping_criteria if not _is_made(criterion, generation_config)]
    return decoder.generate(
        input_ids,
        # A mask of ones arrives as None, which would let a pad token inside a prompt count as padding.
        torch.ones_like(input_ids) if mask is None else mask,
        config,
        logits_processor=own,
        stopping_criteria=kept,
        prefix_allowed_tokens_fn=prefix_function,
        past_key_values=past if isinstance(past, EFTPast) else None,
        **{**taken_back, "num_return_sequences": 1, **arguments},
    )


def _taken_back(prepared: GenerationConfig) -> dict[str, None]:
    """The options that a keyword of None took back, as such keywords.

    `generate` fills what is None in a call's config from the model's own and then with defaults, before it
    reads keywords: what has a value in either and is None by now was taken back. Of what has none in either,
    None says nothing new.
    """
    return {name: None for name, value in vars(prepared).items() if value is None and name in FIELDS}


def _check_is_large_base(model: PreTrainedModel, decoder: EFTDecoder) -> None:
    if decoder.models is None or model is not decoder.models.large_base:
        raise ValueError("custom_generate must be used with generate of the decoder's own large_base")


def _check_model_kwargs(
    model_kwargs: dict[str, Any], input_ids: Tensor, mask: Tensor | None, past: Any
) -> None:
    for name, value in model_kwargs.items():
        if name not in _UNREAD and not name.startswith("output_") and value is not None:
            raise ValueError(f"{name} is not supported by custom_generate; prompts are given as input_ids")
    if past is not None and not isinstance(past, EFTPast) and past.get_seq_length() > 0:
        raise ValueError("past_key_values must come from an output of this decoder")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        seen = torch.ones_like(input_ids) if mask is None else mask.long()
        usual = (seen.cumsum(-1) - 1).masked_fill(seen == 0, 0)
        if not torch.equal(positions.expand_as(usual).to(usual), usual):
            raise ValueError("position_ids must count the tokens of each prompt from 0; leave them out")


def _own_processors(
    prepared: Sequence[LogitsProcessor], made: Sequence[LogitsProcessor]
) -> tuple[list[LogitsProcessor], PrefixFunction | None]:
    """The caller's own among the `prepared` ones, and the function of a prefix constraint."""
    unmatched = list(made)
    own: list[LogitsProcessor] = []
    prefix_function: PrefixFunction | None = None
    for processor in prepared:
        twin = next((other for other in unmatched if _alike(processor, other)), None)
        if twin is not None:
            unmatched.remove(twin)
        elif type(processor) is PrefixConstrainedLogitsProcessor:
            prefix_function = _for_each_row(processor._prefix_allowed_tokens_fn, processor._num_beams)
        else:
            own.append(processor)
    return own, prefix_function


def _for_each_row(function: PrefixFunction, rows_of_a_prompt: int) -> PrefixFunction:
    """`function`, which counts prompts, for rows of which so many belong to a prompt."""
    return lambda row, tokens: function(row // rows_of_a_prompt, tokens)


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and _settings(one) == _settings(other)


def _settings(processor: Any) -> dict[str, str]:
    plain = (int, float, str, bool, tuple, list, dict, type(None))
    return {name: repr(value) for name, value in vars(processor).items() if type(value) in plain}


def _is_made(criterion: Any, config: Any) -> bool:
    """Whether `generate` made the criterion of what the decoder decides by itself."""
    if type(criterion) is MaxLengthCriteria:
        return bool(criterion.max_length == config.max_length)
    if type(criterion) is EosTokenCriteria:
        return _as_set(criterion.eos_token_id) == _as_set(config._eos_token_tensor)
    return False


def _as_set(tokens: Any) -> set[int]:
    if tokens is None:
        return set()
    if isinstance(tokens, Tensor):
        tokens = tokens.flatten().tolist()
    return {tokens} if isinstance(tokens, int) else set(tokens)


def generate_from_folder(
    model: PreTrainedModel,
    inputs: Tensor | None,
    decoder: EFTDecoder | None,
    small_tuned: PreTrainedModel | Sequence[PreTrainedModel] | None,
    small_base: PreTrainedModel | None,
    eft_config: EFTConfig | None,
    arguments: dict[str, Any],
) -> Tensor | EFTOutput:
    """What `custom_generate/generate.py` does with what `generate` was called with.

    A decoder of `small_tuned` and `small_base` is built once and kept with the model.
    """
    for name in ("assistant_model", "assistant_tokenizer", "negative_prompt_ids", "inputs_embeds"):
        if arguments.pop(name, None) is not None:
            raise ValueError(f"{name} is not supported by this custom_generate")
    for name in ("negative_prompt_attention_mask", "synced_gpus"):
        arguments.pop(name, None)
    if decoder is None:
        decoder = _decoder_of(model, small_tuned, small_base, eft_config)
    else:
        _check_is_large_base(model, decoder)
    if inputs is not None:
        arguments["input_ids"] = inputs
    return decoder.generate(**arguments)


@dataclass(frozen=True, eq=False)
class _Kept:
    """The decoder that a model keeps; deep copies and files of the model have None instead.

    A decoder has locks and other models, and a file with this class could not be read without this package.
    """

    key: tuple[Any, ...]
    decoder: EFTDecoder

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _decoder_of(
    model: PreTrainedModel, small_tuned: Any, small_base: Any, config: EFTConfig | None
) -> EFTDecoder:
    from .decoder import EFTDecoder

    if small_tuned is None or small_base is None:
        raise ValueError("custom_generate needs decoder=, or small_tuned= and small_base=, loaded models")
    # A shallow copy of a model has what the model keeps.
    key = (model, small_tuned, small_base, config)
    known: _Kept | None = vars(model).get("_speculative_eft")
    if known is None or not all(one is other for one, other in zip(known.key, key, strict=True)):
        decoder = EFTDecoder(EFTModels(model, small_tuned, small_base), config)
        # Past Module.__setattr__: the decoder's models are no submodules of this one.
        vars(model)["_speculative_eft"] = known = _Kept(key, decoder)
    return known.decoder
