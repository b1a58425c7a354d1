"""Every field of transformers' `GenerationConfig`: which path honours it, or why none can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FIELDS", "OTHER_ARGUMENTS", "Field", "Path", "is_neutral"]

Path = Literal["fused", "fused, then the host", "general", "refused", "record"]


@dataclass(frozen=True)
class Field:
    """How one field is treated.

    Attributes:
        path: "fused" by the compiled rounds; "fused, then the host" where tokens are checked as they arrive;
            "general" by the slower path that writes out the mixed logits; "refused"; or "record" for what
            describes the object and asks for nothing.
        neutral: values besides None that ask for what happens anyway.
        sampling: whether transformers reads it only with `do_sample=True`.
        why: of a refused field, the sentence after "is not supported: "; of others, what is worth knowing.
        elsewhere: whether it belongs to another decoding method, so that plain decoding never reads it.
    """

    path: Path
    neutral: tuple[Any, ...] = ()
    sampling: bool = False
    why: str = ""
    elsewhere: bool = False


def _fused(why: str = "") -> Field:
    return Field("fused", why=why)


def _general(*neutral: Any, sampling: bool = False, why: str = "") -> Field:
    return Field("general", neutral, sampling, why)


def _refused(why: str, *neutral: Any, elsewhere: bool = True) -> Field:
    return Field("refused", neutral, why=why, elsewhere=elsewhere)


_BEAMS = "it belongs to beam search, and a draft is verified for one continuation of a prompt"
_ASSISTED = "it belongs to assisted generation; EFTConfig says how drafts are made"
_ENCODER = "it belongs to encoder-decoder models, and the three models are decoders"
_CACHE = "keys and values are kept in the decoder's own cache, one length a sequence"
_INSIDE = "the three models run without keeping what their layers compute"

FIELDS: Mapping[str, Field] = {
    "max_length": _fused("counts the prompt, padding included"),
    "max_new_tokens": _fused("takes precedence over max_length"),
    "min_length": _general(0),
    "min_new_tokens": _general(0),
    "early_stopping": _refused(_BEAMS, False),
    "max_time": Field("fused, then the host", why="the token under way when time is up is the last"),
    "stop_strings": Field("fused, then the host", why="needs a tokenizer: the models' or `tokenizer=`"),
    "do_sample": _fused(),
    "num_beams": _refused(_BEAMS, 1, elsewhere=False),
    "use_mtp": _refused(_ASSISTED, False, elsewhere=False),
    "use_cache": _fused("False: no `past_key_values` in the output"),
    "cache_implementation": _refused(_CACHE, "dynamic"),
    "cache_config": _refused(_CACHE),
    "max_cache_len": _refused(_CACHE),
    "temperature": _fused("0 is greedy decoding; else what is below 1e-30 or above 1e30 counts as that"),
    "top_k": _fused("50 unless something else is asked for, as in transformers"),
    "top_p": _fused(),
    "min_p": _fused(),
    "top_h": _general(sampling=True),
    "typical_p": _general(1.0, sampling=True),
    "epsilon_cutoff": _general(0.0, sampling=True),
    "eta_cutoff": _general(0.0, sampling=True),
    "repetition_penalty": _general(1.0),
    "encoder_repetition_penalty": _general(1.0, why="the encoder's input is the prompt, as in transformers"),
    "length_penalty": _refused(_BEAMS, 1.0),
    "no_repeat_ngram_size": _general(0),
    "bad_words_ids": _general(),
    "renormalize_logits": _general(False),
    "forced_bos_token_id": _general(why="acts on a prompt of one token, as in transformers"),
    "forced_eos_token_id": _general(),
    "remove_invalid_values": _general(False),
    "exponential_decay_length_penalty": _general(why="ignored where no token ends sequences"),
    "suppress_tokens": _general(),
    "begin_suppress_tokens": _general(),
    "sequence_bias": _general(),
    "token_healing": _refused(
        "it samples the prompt's last token again from the large base alone; call large.heal_tokens first",
        False,
        elsewhere=False,
    ),
    "guidance_scale": _refused(
        "classifier-free guidance mixes a second run of one model; alpha and beta of EFTConfig mix three",
        1.0,
        elsewhere=False,
    ),
    "watermarking_config": _general(),
    "num_return_sequences": _fused(),
    "output_attentions": _refused(_INSIDE, False, elsewhere=False),
    "output_hidden_states": _refused(_INSIDE, False, elsewhere=False),
    "output_scores": _general(False, why="of the target, after every processor"),
    "output_logits": _general(False, why="of the target, before any processor"),
    "return_dict_in_generate": _fused(),
    "pad_token_id": _fused(),
    "bos_token_id": _fused("begins a sequence where no prompt is given"),
    "eos_token_id": _fused("unless the call says otherwise, those of all models end a sequence"),
    "encoder_no_repeat_ngram_size": _general(0, why="the encoder's input is the prompt, as in transformers"),
    "decoder_start_token_id": _refused(_ENCODER),
    "is_assistant": _refused(_ASSISTED, False, elsewhere=False),
    "num_assistant_tokens": _refused(_ASSISTED, 20),
    "num_assistant_tokens_schedule": _refused(_ASSISTED, "constant"),
    "assistant_confidence_threshold": _refused(_ASSISTED, 0.4),
    "prompt_lookup_num_tokens": _refused(_ASSISTED, elsewhere=False),
    "max_matching_ngram_size": _refused(_ASSISTED),
    "assistant_early_exit": _refused(_ASSISTED, elsewhere=False),
    "assistant_lookbehind": _refused(_ASSISTED, 10),
    "target_lookbehind": _refused(_ASSISTED, 10),
    "assistant_ensemble_weight": _refused(_ASSISTED),
    "speculation_type": _refused(_ASSISTED),
    "compile_config": _refused("the rounds are not compiled by torch.compile"),
    "disable_compile": _fused("nothing is compiled by torch.compile anyway"),
    "continuous_batching_config": _refused("it belongs to generate_batch"),
    "low_memory": _refused("it belongs to contrastive search, which is another law", False),
    "penalty_alpha": _refused("it asks for contrastive search, which is another law", 0.0, elsewhere=False),
    "dola_layers": _refused("DoLa contrasts layers of one model, which is another law", elsewhere=False),
    "diversity_penalty": _refused(_BEAMS, 0.0),
    "num_beam_groups": _refused(_BEAMS, 1, elsewhere=False),
    "constraints": _refused(_BEAMS, elsewhere=False),
    "force_words_ids": _refused(_BEAMS, elsewhere=False),
    "prefill_chunk_size": _fused("tokens of a prompt that run at a time"),
    "_commit_hash": Field("record"),
    "_from_model_config": Field("record"),
    "transformers_version": Field("record"),
}

OTHER_ARGUMENTS: Mapping[str, str] = {
    "assistant_model": _ASSISTED,
    "assistant_tokenizer": _ASSISTED,
    "negative_prompt_ids": "classifier-free guidance mixes a second run of one model",
    "encoder_outputs": _ENCODER,
    "decoder_input_ids": _ENCODER,
    "inputs_embeds": "prompts are given as input_ids, since every model has its own embedding",
    "position_ids": "the tokens of each prompt are counted from 0",
    "custom_generate": "this is the custom generation",
    "token_type_ids": "decoders read no types of tokens",
    "synced_gpus": "each process decodes by itself",
    "use_model_defaults": "what a call does not name is as the large base's own config says",
}
"""Arguments of transformers' `generate` that no path honours, and why."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether `value` of the field `name` asks for nothing that does not happen anyway."""
    return value is None or any(
        type(value) in (int, float, bool, str) and value == neutral for neutral in FIELDS[name].neutral
    )
