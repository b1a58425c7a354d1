"""Bad input, as a new user would try it: one clear error before a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from speculative_eft.decoding import EFTDecoder
from speculative_eft.models import EFTModels

from ..models.families import CONTEXT
from ..tiny_models import VOCAB, tiny_trio

SAMPLED = {"do_sample": True}
SEVERAL = {"num_return_sequences": 2, **SAMPLED}
ENDS = {"eos_token_id": 5}
TWO = torch.ones(2, 3, dtype=torch.int64)

BAD: list[tuple[str, dict[str, Any]]] = [
    ("logits_processor must be a list of callables", {"logits_processor": [3]}),
    ("logits_processor must be a list of callables", {"logits_processor": lambda ids, scores: scores}),
    (r"returned \[1, 5\] for scores of shape", {"logits_processor": [lambda ids, scores: scores[:, :5]]}),
    ("returned NoneType", {"logits_processor": [lambda ids, scores: None]}),
    ("division by zero", {"logits_processor": [lambda ids, scores: 1 / 0]}),
    ("stopping_criteria must be a list of callables", {"stopping_criteria": ["end"]}),
    ("stopping_criteria must be a list of callables", {"stopping_criteria": 5}),
    ("prefix_allowed_tokens_fn must be a function", {"prefix_allowed_tokens_fn": 3}),
    ("returned an empty list", {"prefix_allowed_tokens_fn": lambda row, ids: []}),
    ("streamer must have put and end", {"streamer": object()}),
    ("stop_strings needs a tokenizer", {"stop_strings": "a"}),
    ("stop_strings must be a string or a list", {"stop_strings": [""]}),
    ("stop_strings must be a string or a list", {"stop_strings": 5}),
    ("tokenizer must be a transformers tokenizer", {"stop_strings": "a", "tokenizer": 5}),
    ("max_time must be a finite number of at least 0", {"max_time": -1}),
    ("max_time must be a finite number of at least 0", {"max_time": "soon"}),
    ("bad_words_ids holds the id 500", {"bad_words_ids": [[500]]}),
    ("bad_words_ids must hold token ids", {"bad_words_ids": [5]}),
    ("bad_words_ids` has to be a non-empty list", {"bad_words_ids": []}),
    ("suppress_tokens holds the id 101", {"suppress_tokens": [101]}),
    ("suppress_tokens must hold token ids", {"suppress_tokens": 5}),
    ("begin_suppress_tokens holds the id -1", {"begin_suppress_tokens": [-1]}),
    ("sequence_bias holds the id 500", {"sequence_bias": {(500,): 1.0}}),
    ("sequence_bias must hold token ids", {"sequence_bias": 3}),
    ("forced_eos_token_id holds the id 999", {"forced_eos_token_id": 999}),
    ("repetition_penalty must be a finite number above 0", {"repetition_penalty": "x"}),
    ("repetition_penalty must be a finite", {"repetition_penalty": -1.0}),
    ("no_repeat_ngram_size must be an integer", {"no_repeat_ngram_size": -1}),
    ("no_repeat_ngram_size must be an integer", {"no_repeat_ngram_size": 1.5}),
    (r"typical_p must lie in \(0, 1\]", {"typical_p": 2.0, **SAMPLED}),
    ("top_h must lie", {"top_h": 2.0, **SAMPLED}),
    ("epsilon_cutoff must lie", {"epsilon_cutoff": 2.0, **SAMPLED}),
    ("eta_cutoff must lie", {"eta_cutoff": "x", **SAMPLED}),
    ("min_length must be an integer", {"min_length": -1, **ENDS}),
    ("min_new_tokens must be an integer", {"min_new_tokens": "x", **ENDS}),
    ("exponential_decay_length_penalty must be a pair", {"exponential_decay_length_penalty": 3, **ENDS}),
    ("exponential_decay_length_penalty must be a pair", {"exponential_decay_length_penalty": (3,), **ENDS}),
    ("watermarking_config must be", {"watermarking_config": 3}),
    ("WatermarkLogitsProcessor", {"watermarking_config": {"bias": "x"}}),
    ("greenlist_ratio", {"watermarking_config": {"greenlist_ratio": 2.0}}),
    ("num_return_sequences must be an integer of at least 1", {"num_return_sequences": 0, **SAMPLED}),
    ("num_return_sequences=2 needs do_sample=True", {"num_return_sequences": 2}),
    ("seed has 1 values for 2 sequences", {"num_return_sequences": 2, "seed": [1], **SAMPLED}),
    ("prefill_chunk_size must be", {"prefill_chunk_size": 0}),
    ("eos_token_id must be a token id", {"eos_token_id": "x"}),
    ("eos_token_id must be a token id", {"eos_token_id": 2**63}),
    ("eos_token_id must be a token id", {"eos_token_id": [5, -(2**63) - 1]}),
    ("pad_token_id must be a token id", {"pad_token_id": -5}),
    ("pad_token_id must be a token id", {"pad_token_id": 2**63}),
    ("bos_token_id must be a token id", {"input_ids": None, "bos_token_id": 2**63}),
    ("bos_token_id must be a token id", {"bos_token_id": "x"}),
    ("input_ids is missing", {"input_ids": None, "bos_token_id": None}),
    ("holds the id 500", {"input_ids": None, "bos_token_id": 500}),
    ("input_ids is empty", {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}),
    ("input_ids must be an integer tensor .*, got list", {"input_ids": [[1, 2]]}),
    (r"input_ids must be .*, got torch.int64 \[3\]", {"input_ids": torch.zeros(3, dtype=torch.int64)}),
    (r"input_ids must be .*, got torch.float32 \[1, 3\]", {"input_ids": torch.zeros(1, 3)}),
    ("input_ids must be an integer tensor", {"input_ids": torch.ones(1, 3, dtype=torch.bool)}),
    ("id 101, outside", {"input_ids": torch.tensor([[4, VOCAB]])}),
    ("id -1, outside", {"input_ids": torch.tensor([[4, -1]])}),
    ("exceed the context", {"max_new_tokens": CONTEXT}),
    ("shorten the prompt", {"input_ids": torch.ones(1, CONTEXT + 1, dtype=torch.int64)}),
    ("inputs is another name of input_ids", {"inputs": torch.ones(1, 3, dtype=torch.int64)}),
    ("token_type_ids is not supported", {"token_type_ids": torch.zeros(1, 3)}),
    ("attention_mask must be a tensor", {"attention_mask": [1]}),
    ("attention_mask of shape", {"attention_mask": torch.ones(1, 4)}),
    ("without tokens", {"attention_mask": torch.zeros(1, 3)}),
    ("generation_config must be a GenerationConfig", {"generation_config": {"max_new_tokens": 3}}),
    ("past_key_values must come from an output", {"cache": 3}),
    ("use_cache must be True or False", {"use_cache": "no"}),
    ("do_sample must be True or False", {"do_sample": "yes"}),
    ("max_new_tokens must be an integer of at least 1", {"max_new_tokens": 0}),
    ("max_length must be an integer", {"max_length": "x"}),
    ("max_length=2 leaves no room", {"max_length": 2, "max_new_tokens": None}),
    ("temperature must be a finite number of at least 0, got 'x'", {"temperature": "x", **SAMPLED}),
    ("temperature must be a finite number of at least 0, got -1", {"temperature": -1, **SAMPLED}),
    ("temperature must be a finite number of at least 0, got nan", {"temperature": math.nan, **SAMPLED}),
    ("temperature must be a finite number of at least 0", {"temperature": math.inf, **SAMPLED}),
    ("temperature must be a finite number of at least 0", {"temperature": 10**400, **SAMPLED}),
    ("top_p must lie between 0 and 1, got 1.5", {"top_p": 1.5, **SAMPLED}),
    ("top_p must lie between 0 and 1, got 1.5", {"top_p": 1.5}),
    ("top_k must be an integer", {"top_k": 2.5}),
    ("top_k must be an integer", {"top_k": -1}),
    ("num_beams=4 is not supported", {"num_beams": 4}),
    ("length_penalty=2.0 is not supported", {"length_penalty": 2.0}),
    ("seed has 2 values", {"seed": [1, 2]}),
    ("seed must be", {"seed": "1"}),
    ("seed must be", {"seed": 2**64}),
    ("seed must be", {"seed": True}),
    ("seed must be", {"seed": [1.5]}),
    ("streamer takes one sequence", {"input_ids": TWO, "streamer": TextStreamer(None)}),
    ("tuned_input_ids must be an integer tensor", {"tuned_input_ids": 5}),
    ("tuned_input_ids must be an integer tensor", {"tuned_input_ids": [[1, 2]], **SEVERAL}),
    ("tuned_input_ids must be an integer tensor", {"tuned_input_ids": torch.tensor(5), **SEVERAL}),
    (
        "tuned_attention_mask must be a tensor",
        {"tuned_input_ids": torch.tensor([[5]]), "tuned_attention_mask": [[1]], **SEVERAL},
    ),
    ("tuned_input_ids has 2 prompts", {"tuned_input_ids": TWO}),
    (
        f"a prompt of {CONTEXT} tokens and .* exceed the context",
        {"tuned_input_ids": torch.ones(1, CONTEXT, dtype=torch.int64)},
    ),
    (
        r"tuned_attention_mask of shape \[1, 9\]",
        {"tuned_input_ids": torch.tensor([[5]]), "tuned_attention_mask": torch.ones(1, 9)},
    ),
    ("assistant_model is not supported: it belongs to assisted", {"assistant_model": object()}),
    ("negative_prompt_ids is not supported: classifier-free", {"negative_prompt_ids": torch.tensor([[5]])}),
    ("inputs_embeds is not supported: prompts are given", {"inputs_embeds": torch.zeros(1, 2, 32)}),
    ("temprature is not a generation option; did you mean temperature", {"temprature": 0.5}),
]


@pytest.fixture(scope="module")
def models() -> EFTModels:
    models = tiny_trio("llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("a model ran")

    for model in (models.large_base, *models.small_tuned, models.small_base):
        for module in model.modules():
            module.register_forward_pre_hook(refuse)
    runners = models.runners()
    for runner in (runners.large, *runners.tuned, runners.base):
        nothing: Callable[..., None] = refuse
        runner.prefill = nothing  # type: ignore[method-assign]
    return models


@pytest.mark.parametrize(("message", "arguments"), BAD, ids=range(len(BAD)))
def test_one_clear_error_before_a_model_runs(
    message: str, arguments: dict[str, Any], models: EFTModels
) -> None:
    call = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        EFTDecoder(models).generate(**call)


def test_the_models_would_be_seen_to_run(models: EFTModels) -> None:
    with pytest.raises(AssertionError, match="a model ran"):
        EFTDecoder(models).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
