"""A tiny random model of every family that the runner is tested with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT = 64
"""Positions of every model that is not made for others."""

WINDOW = 7
"""Sliding window of the models that have one: shorter than the sequences in the tests."""

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_FALCON = {**_COMMON, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}
_GEMMA = {**_GROUPED, **_TWO_KINDS, "head_dim": 16, "query_pre_attn_scalar": 16}
# Eager, because the sdpa of older transformers leaves the soft-cap out; low caps, so that they matter.
_GEMMA2 = {
    **_GEMMA,
    "attn_implementation": "eager",
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 2.0,
}

_FAMILIES: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **_GROUPED,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-dynamic-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {**_GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "falcon-multi-query": (FalconForCausalLM, FalconConfig, _FALCON),
    "falcon-new-decoder": (
        FalconForCausalLM,
        FalconConfig,
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-alibi": (
        FalconForCausalLM,
        FalconConfig,
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen2-sliding": (Qwen2ForCausalLM, Qwen2Config, {**_GROUPED, **_TWO_KINDS, "use_sliding_window": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {**_GROUPED, "head_dim": 16}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GEMMA2),
    # It knows the cap of Gemma-2's scores and leaves it out.
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GEMMA, "attn_logit_softcapping": 0.5}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _COMMON),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**_COMMON, "intermediate_size": 64}),
    "opt": (OPTForCausalLM, OPTConfig, {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {
            **_GROUPED,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.7,
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _GROUPED),
    "olmo3": (
        Olmo3ForCausalLM,
        Olmo3Config,
        {
            **_GROUPED,
            **_TWO_KINDS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10_000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        },
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, _GROUPED),
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            **_GROUPED,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
}

FAMILIES = tuple(_FAMILIES)
COMPILED = (
    "llama", "llama3-rope", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma", "gemma2", "gemma3",
    "granite", "olmo2", "olmo3", "phi3",
)  # fmt: skip
"""Those that run compiled on a CPU."""
OF_OTHER_LAYERS = ("gemma2", "gemma3", "granite", "olmo3", "phi3")
"""Of these some whose layers have other parts than Llama's, or have them elsewhere."""


def tiny_model(name: str, seed: int = 0, vocab_size: int = 101, context: int = CONTEXT) -> PreTrainedModel:
    """A model of family `name` in float32 with random weights fixed by `seed`, for `context` positions.

    The weights are larger than a fresh model's, so that its distributions are far from uniform.
    """
    model_class, config_class, settings = _FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {**settings, "vocab_size": vocab_size, "max_position_embeddings": context}
        model = model_class(config_class(**sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
    return model


def with_uneven_norms(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, after whose weights of norms, and biases, are all different."""
    choose = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=choose), alpha=0.2)
    return model
