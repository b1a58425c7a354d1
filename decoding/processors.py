"""transformers' logits processors on the target: built by its own code, applied along a draft.

Row i of a draft is processed with the prompt, the committed tokens and x_1..x_i as `input_ids`, one row after
the other, so that each processor sees what it would see in plain decoding and the law is that of plain
decoding with it. The draft law is processed in the same way, which any law may be (docs/math.md) and which
keeps it close to the target.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    SynthIDTextWatermarkLogitsProcessor,
)

from speculative_eft.kernels import usable_temperature

from .options import GenerationOptions

__all__ = ["PrefixFunction", "Processing", "build_processing", "process_rows"]

PrefixFunction = Callable[[int, Tensor], "list[int]"]


@dataclasses.dataclass(frozen=True)
class Processing:
    """What the general path applies to logits.

    Attributes:
        target: processors of the target's mixed logits, temperature and filters among them.
        draft: processors of the draft law.
        prompts: int64 [batch, width], padding included.
    """

    target: LogitsProcessorList
    draft: LogitsProcessorList
    prompts: Tensor


class _Replayed(LogitsProcessor):
    """A SynthID watermark as a function of `input_ids`: its state is what the tokens so far make of it."""

    def __init__(self, processor: Any, prompt_width: int) -> None:
        self.processor = processor
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.processor.state = None
        nothing = scores.new_zeros(scores.shape[0], 1)
        for length in range(self.prompt_width, input_ids.shape[1]):
            self.processor(input_ids[:, :length], nothing)
        return self.processor(input_ids, scores)


class _Owner(GenerationMixin):
    """Stands in for a model where transformers builds processors; it asks for no more than this."""

    def __init__(self, vocab_size: int) -> None:
        text = SimpleNamespace(vocab_size=vocab_size)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)


def build_processing(
    options: GenerationOptions,
    custom: Sequence[LogitsProcessor],
    prefix_function: PrefixFunction | None,
    prompts: Tensor,
    attention_mask: Tensor | None,
    vocab_size: int,
    draft_temperature: float | None,
) -> Processing | None:
    """The processors of one call, or None where the fused path does all that is asked for.

    Args:
        custom: the caller's own processors, each a function of `(input_ids, scores)` alone.
        prefix_function: transformers' `prefix_allowed_tokens_fn`.
        prompts, attention_mask: int64 [batch, width], as the caller gave them.
        draft_temperature: of the draft law, None for the target's.

    Raises:
        ValueError: for values that transformers refuses, for token ids outside the vocabulary, and for a
            processor that fails on the prompts.
    """
    if not options.general and not custom and prefix_function is None:
        return None
    _check_token_ids(options, vocab_size)
    if prefix_function is not None and not callable(prefix_function):
        raise ValueError(f"prefix_allowed_tokens_fn must be a function, got {type(prefix_function).__name__}")
    if attention_mask is not None and bool((attention_mask != 0).all()):
        attention_mask = None

    def build(config: GenerationConfig) -> LogitsProcessorList:
        # transformers' classes index scores by them.
        ends = [token for token in options.eos_token_ids if 0 <= token < vocab_size]
        config = copy.copy(config)
        config._eos_token_tensor = torch.tensor(ends, device=prompts.device) if ends else None
        if not ends:
            # transformers makes a processor of it that needs an end to make likelier.
            config.exponential_decay_length_penalty = None
        owner: Any = _Owner(vocab_size)
        try:
            built = owner._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=prompts.shape[1],
                encoder_input_ids=prompts,
                prefix_allowed_tokens_fn=prefix_function,
                logits_processor=LogitsProcessorList(custom),
                device=prompts.device,
                model_kwargs={"attention_mask": attention_mask},
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{', '.join(options.general)}: {error}") from error
        return LogitsProcessorList(
            _Replayed(processor, prompts.shape[1])
            if isinstance(processor, SynthIDTextWatermarkLogitsProcessor)
            else processor
            for processor in built
        )

    target = build(options.config)
    draft = target
    if draft_temperature is not None and options.temperature > 0:
        config = copy.copy(options.config)
        config.temperature = usable_temperature(draft_temperature)
        draft = build(config)
    _try_out(target, prompts, vocab_size)
    return Processing(target, draft, prompts)


def _try_out(processors: LogitsProcessorList, prompts: Tensor, vocab_size: int) -> None:
    """Raise ValueError now for what a processor cannot do with a first token's scores."""
    scores = torch.zeros(prompts.shape[0], vocab_size, device=prompts.device)
    for processor in processors:
        name = type(processor).__name__
        try:
            scores = processor(prompts, scores)
        except Exception as error:  # whatever it is, it would end the call later
            raise ValueError(f"logits processor {name}: {error}") from error
        shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != [prompts.shape[0], vocab_size]:
            raise ValueError(
                f"logits processor {name} returned {shape} for scores of shape "
                f"{[prompts.shape[0], vocab_size]}"
            )


def _check_token_ids(options: GenerationOptions, vocab_size: int) -> None:
    config = options.config
    named: dict[str, Iterable[Any]] = {
        "bad_words_ids": (token for word in config.bad_words_ids or () for token in word),
        "suppress_tokens": config.suppress_tokens or (),
        "begin_suppress_tokens": config.begin_suppress_tokens or (),
        "forced_bos_token_id": _as_list(config.forced_bos_token_id),
        "forced_eos_token_id": _as_list(config.forced_eos_token_id),
        "sequence_bias": _biased(config.sequence_bias),
    }
    for name, tokens in named.items():
        if name not in options.general:
            continue
        try:
            wrong = [token for token in tokens if not 0 <= int(token) < vocab_size]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must hold token ids, got {getattr(config, name)!r}") from error
        if wrong:
            raise ValueError(f"{name} holds the id {wrong[0]}, outside the vocabulary of {vocab_size} ids")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _biased(bias: Any) -> Iterable[Any]:
    """The tokens of a bias in either of its two forms, read when they are asked for."""
    for sequence in bias or ():
        yield from sequence if isinstance(bias, dict) else sequence[0]


def process_rows(
    processors: LogitsProcessorList,
    history: Tensor,
    starts: Sequence[int],
    counts: Sequence[int],
    scores: Tensor,
) -> Tensor:
    """Process consecutive rows of each sequence's scores: row i knows the tokens before `starts + i`.

    Processors see the whole batch at once, as in plain decoding, so sequences that stand at the same length
    share a call. What they make of another sequence in such a call is not read.

    Args:
        history: int64 [batch, capacity], prompt with padding, committed tokens, drafted tokens.
        starts: for each sequence the length of `input_ids` at its row 0.
        counts: rows wanted of each sequence; the others are left as they are.
        scores: float32 [batch, rows, vocab].

    Returns:
        float32 [batch, rows, vocab], a new tensor.
    """
    batch, rows, _ = scores.shape
    processed = scores.clone()
    every = torch.arange(batch, device=scores.device)
    spans = list(zip(starts, counts, strict=True))
    for length in sorted({start + row for start, count in spans for row in range(count)}):
        row = [min(max(length - start, 0), rows - 1) for start in starts]
        members = [i for i, (start, count) in enumerate(spans) if 0 <= length - start < count]
        index = torch.tensor(row, device=scores.device)
        changed: Tensor = processors(history[:, :length], scores[every, index])  # type: ignore[arg-type]
        chosen = torch.tensor(members, device=scores.device)
        processed[chosen, index[chosen]] = changed[chosen].to(torch.float32)
    return processed
