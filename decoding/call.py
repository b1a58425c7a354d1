"""One call of `generate`: its arguments as given, and what they say, checked whole before any model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from speculative_eft.models import EFTModels

from .chat import Chat, PlainChat, chat_prompts, plain_chat
from .options import GenerationOptions, read_options
from .past import EFTPast
from .processors import PrefixFunction, Processing, build_processing
from .prompts import Prompts, read_prompts, read_seeds, repeated
from .stopping import build_criteria
from .streaming import Streamer, TokenCallback, check_streamer

__all__ = ["Arguments", "Call", "read_call"]


@dataclass(frozen=True)
class Arguments:
    """The arguments of `EFTDecoder.generate`, as given."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    generation_config: GenerationConfig | None
    generation_kwargs: Mapping[str, Any]
    seed: int | Sequence[int] | None
    tuned_input_ids: Tensor | None
    tuned_attention_mask: Tensor | None
    chat: Chat | Sequence[Chat] | None
    chat_rendering: PlainChat | None
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: Sequence[StoppingCriteria] | None
    prefix_allowed_tokens_fn: PrefixFunction | None
    tokenizer: Any
    past_key_values: EFTPast | None
    streamer: Streamer | TokenCallback | None


@dataclass(frozen=True)
class Call:
    """A call that can run.

    Attributes:
        input_ids: int64 [batch, width], what the output begins with; one row a continuation.
        prompts, tuned_prompts: of the bases and of the tuned models.
        seeds: int64 [batch], on the CPU.
        processing: what the general path applies; None for the fused path.
        criteria: what the host asks about each token; possibly empty.
        past: what the caches may hold already.
    """

    input_ids: Tensor
    prompts: Prompts
    tuned_prompts: Prompts
    options: GenerationOptions
    seeds: Tensor
    processing: Processing | None
    criteria: StoppingCriteriaList
    past: EFTPast | None
    streamer: Streamer | TokenCallback | None


def read_call(
    given: Arguments,
    models: EFTModels | None,
    generation_configs: Sequence[GenerationConfig],
    vocab_size: int,
    tuned_vocab_size: int,
    device: torch.device,
    draft_temperature: float | None,
) -> Call:
    """Check the arguments and put them in the form in which they run.

    Args:
        generation_configs: of the models, the large base's first.
        vocab_size: ids at or above it are never produced, and the bases' prompts hold none.
        tuned_vocab_size: the same for the tuned models' own prompts.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    ids, mask, tuned_ids, tuned_mask = _prompts(given, models)
    width = 1 if ids is None else _checked_width(ids, mask, vocab_size)
    options = read_options(given.generation_config, given.generation_kwargs, generation_configs, width)
    if ids is None and options.bos_token_id is None:
        raise ValueError("input_ids is missing; give prompts, or chat, or bos_token_id to begin with")
    input_ids = torch.tensor([[options.bos_token_id]]) if ids is None else ids.to(torch.int64)
    if mask is None:
        mask = _inferred_mask(input_ids, options)
    copies = options.num_return_sequences
    input_ids = input_ids.repeat_interleave(copies, dim=0)
    mask, tuned_ids, tuned_mask = (repeated(part, copies) for part in (mask, tuned_ids, tuned_mask))
    prompts = tuned_prompts = read_prompts(input_ids, mask, vocab_size)
    batch = input_ids.shape[0]
    if tuned_ids is not None:
        tuned_prompts = read_prompts(tuned_ids, tuned_mask, tuned_vocab_size, "tuned_input_ids")
        tuned_batch = tuned_prompts.tokens.shape[0]
        if tuned_batch != batch:
            raise ValueError(f"tuned_input_ids has {tuned_batch // copies} prompts for {batch // copies}")
    elif tuned_mask is not None:
        raise ValueError("tuned_attention_mask is given without tuned_input_ids")
    check_streamer(given.streamer, batch)
    past = given.past_key_values
    if past is not None and not isinstance(past, EFTPast):
        raise ValueError(
            f"past_key_values must come from an output of this decoder, got {type(past).__name__}"
        )
    processing = build_processing(
        options,
        _callables("logits_processor", given.logits_processor),
        given.prefix_allowed_tokens_fn,
        input_ids.to(device),
        None if mask is None else mask.to(device),
        vocab_size,
        draft_temperature,
    )
    tokenizer = given.tokenizer if given.tokenizer is not None else getattr(models, "tokenizer", None)
    return Call(
        input_ids=input_ids,
        prompts=prompts,
        tuned_prompts=tuned_prompts,
        options=options,
        seeds=read_seeds(given.seed, batch),
        processing=processing,
        criteria=build_criteria(options, _callables("stopping_criteria", given.stopping_criteria), tokenizer),
        past=past,
        streamer=given.streamer,
    )


def _prompts(
    given: Arguments, models: EFTModels | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if given.chat is None:
        if given.chat_rendering is not None:
            raise ValueError("chat_rendering is given without chat")
        return given.input_ids, given.attention_mask, given.tuned_input_ids, given.tuned_attention_mask
    others = ("input_ids", "attention_mask", "tuned_input_ids", "tuned_attention_mask")
    for name in others:
        if getattr(given, name) is not None:
            raise ValueError(f"{name} is given beside chat; give one of them")
    tokenizer = given.tokenizer if given.tokenizer is not None else getattr(models, "tokenizer", None)
    chat_tokenizer = getattr(models, "chat_tokenizer", None)
    return chat_prompts(given.chat, tokenizer, chat_tokenizer, given.chat_rendering or plain_chat)


def _callables(name: str, given: Any) -> Sequence[Any]:
    if given is None:
        return ()
    if not isinstance(given, Sequence) or not all(callable(one) for one in given):
        raise ValueError(f"{name} must be a list of callables, got {given!r}")
    return given


def _inferred_mask(input_ids: Tensor, options: GenerationOptions) -> Tensor | None:
    """0 wherever a prompt has the pad token, if that can only be padding; else None."""
    if not options.marks_padding:
        return None
    mask = (input_ids != options.pad_token_id).to(torch.int64)
    return None if bool(mask.all()) else mask


def _checked_width(input_ids: Tensor, mask: Tensor | None, vocab_size: int) -> int:
    read_prompts(input_ids, mask, vocab_size)
    return input_ids.shape[1]
