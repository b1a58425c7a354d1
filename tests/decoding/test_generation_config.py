"""Every field of GenerationConfig: what becomes of it is written in docs/generation_config.md, and holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, NaiveEFTDecoder
from speculative_eft.decoding.call import Arguments, read_call
from speculative_eft.decoding.fields import FIELDS
from speculative_eft.models import EFTModels

from ..models.families import tiny_model
from ..tiny_models import VOCAB, perturbed, ragged_prompts, tiny_trio
from ..tokenizers_of_words import word_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "generation_config.md"
DOCUMENTED_VERSION = "5.23.0"

SYNTH_ID = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[7, 11, 13], context_history_size=8)

# A value of each field that asks for something, and what else it takes to be asked for.
EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_length": (18, {"max_new_tokens": None}),
    "max_new_tokens": (7, {}),
    "min_length": (20, {"eos_token_id": "frequent"}),
    "min_new_tokens": (9, {"eos_token_id": "frequent"}),
    "early_stopping": (True, {}),
    "max_time": (60.0, {}),
    "stop_strings": (["w21"], {}),
    "do_sample": (True, {}),
    "num_beams": (4, {}),
    "use_mtp": (True, {}),
    "use_cache": (False, {}),
    "cache_implementation": ("static", {}),
    "cache_config": ({"nbits": 4}, {}),
    "max_cache_len": (128, {}),
    "temperature": (0.7, {"do_sample": True}),
    "top_k": (5, {"do_sample": True}),
    "top_p": (0.8, {"do_sample": True}),
    "min_p": (0.1, {"do_sample": True}),
    "top_h": (0.5, {"do_sample": True}),
    "typical_p": (0.6, {"do_sample": True}),
    "epsilon_cutoff": (0.02, {"do_sample": True}),
    "eta_cutoff": (0.5, {"do_sample": True}),
    "repetition_penalty": (1.6, {}),
    "encoder_repetition_penalty": (1.6, {}),
    "length_penalty": (2.0, {}),
    "no_repeat_ngram_size": (2, {}),
    "bad_words_ids": ([[21], [49, 91]], {}),
    "renormalize_logits": (True, {}),
    "forced_bos_token_id": (9, {"one_token": True}),
    "forced_eos_token_id": (17, {}),
    "remove_invalid_values": (True, {}),
    "exponential_decay_length_penalty": ((3, 1.3), {"eos_token_id": 5}),
    "suppress_tokens": ([21, 49], {}),
    "begin_suppress_tokens": ([0, 61], {}),
    "sequence_bias": ({(21,): -10.0, (49, 91): 4.0}, {}),
    "token_healing": (True, {}),
    "guidance_scale": (1.5, {}),
    "watermarking_config": (WatermarkingConfig(bias=2.5), {}),
    "num_return_sequences": (2, {"do_sample": True}),
    "output_attentions": (True, {}),
    "output_hidden_states": (True, {}),
    "output_scores": (True, {"return_dict_in_generate": True}),
    "output_logits": (True, {"return_dict_in_generate": True}),
    "return_dict_in_generate": (True, {}),
    "pad_token_id": (3, {"eos_token_id": "frequent"}),
    "bos_token_id": (2, {"no_prompt": True}),
    "eos_token_id": ("frequent", {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "decoder_start_token_id": (0, {}),
    "is_assistant": (True, {}),
    "num_assistant_tokens": (5, {}),
    "num_assistant_tokens_schedule": ("heuristic", {}),
    "assistant_confidence_threshold": (0.6, {}),
    "prompt_lookup_num_tokens": (3, {}),
    "max_matching_ngram_size": (2, {}),
    "assistant_early_exit": (1, {}),
    "assistant_lookbehind": (4, {}),
    "target_lookbehind": (4, {}),
    "assistant_ensemble_weight": (0.5, {}),
    "speculation_type": ("dflash", {}),
    "compile_config": (CompileConfig(), {}),
    "disable_compile": (True, {}),
    "continuous_batching_config": ({}, {}),
    "low_memory": (True, {}),
    "penalty_alpha": (0.6, {}),
    "dola_layers": ("high", {}),
    "diversity_penalty": (0.5, {}),
    "num_beam_groups": (2, {}),
    "constraints": ([1], {}),
    "force_words_ids": ([[5]], {}),
    "prefill_chunk_size": (4, {}),
}
RECORDS = [name for name, field in FIELDS.items() if field.path == "record"]
HONOURED = [name for name in EXAMPLES if FIELDS[name].path not in ("refused", "record")]
BOTH = {"watermarking_config": SYNTH_ID}


@pytest.fixture(scope="module")
def models() -> EFTModels:
    return with_tokenizer(tiny_trio("llama"))


@pytest.fixture(scope="module")
def large_alone() -> EFTModels:
    """Models whose target is the large base's own law: the tuned model is the small base."""
    return with_tokenizer(
        EFTModels(
            large_base=perturbed(tiny_model("llama", 0), 1, 0.02),
            small_tuned=tiny_model("llama", 0),
            small_base=tiny_model("llama", 0),
        )
    )


def with_tokenizer(models: EFTModels) -> EFTModels:
    models.tokenizer = word_tokenizer(VOCAB)
    return models


def asked(name: str, value: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Prompts and options of an example."""
    example, extra = EXAMPLES[name]
    options = {"max_new_tokens": 12, **extra, name: example if value is None else value}
    prompts = ragged_prompts(3)
    if options.pop("one_token", False):
        prompts = {"input_ids": torch.tensor([[7], [9], [12]])}
    if options.pop("no_prompt", False):
        prompts = {}
    for option in ("eos_token_id",):
        if options.get(option) == "frequent":
            options[option] = [21, 89, 18]
    return prompts, options


def read(name: str, models: EFTModels | None = None) -> str:
    """The path that honours a field's example, or the sentence that refuses it."""
    prompts, options = asked(name)
    given = Arguments(
        **dict.fromkeys(Arguments.__dataclass_fields__)
        | {"generation_kwargs": options, "tokenizer": word_tokenizer(VOCAB), **prompts}
    )
    try:
        call = read_call(given, None, [], VOCAB, VOCAB, torch.device("cpu"), None)
    except ValueError as error:
        return str(error)
    if call.processing is not None:
        return "general"
    return "fused, then the host" if call.criteria else "fused"


def table() -> str:
    lines = [
        "# GenerationConfig, field by field",
        "",
        f"What becomes of each field of transformers {DOCUMENTED_VERSION}'s `GenerationConfig`, found by "
        "trying the example. tests/decoding/test_generation_config.py makes this page and fails when it is "
        "out of date.",
        "",
        "* *fused*: by the compiled rounds.",
        "* *fused, then the host*: the compiled rounds, and each committed token is looked at on the host.",
        "* *general*: transformers' own processors on the target's mixed logits "
        "β L + Σ αᵢ Fᵢ + (1 - Σ αᵢ - β) B (with the conservative filter, on the target's log-probabilities), "
        "one row of a draft after the other. Slower; a decoder says so once, in the log.",
        "* *refused*: by a ValueError with this sentence, before any model runs. What a model's own "
        "`generation_config` says of other decoding methods is let pass, as plain decoding does not read it.",
        "* *record*: describes the object and asks for nothing.",
        "",
        "| field | example | what becomes of it | remark or refusal |",
        "|---|---|---|---|",
    ]
    for name in sorted(vars(GenerationConfig())):
        if name in RECORDS:
            lines.append(f"| `{name}` | | record | |")
            continue
        outcome, value = read(name), EXAMPLES[name][0]
        shown = type(value).__name__ + "(...)" if hasattr(value, "to_dict") else repr(value)
        shown = "[a frequent token]" if value == "frequent" else shown
        honoured = outcome in ("fused", "fused, then the host", "general")
        sentence = outcome.replace(repr(value), shown).replace("|", "\\|")
        remark = FIELDS[name].why if honoured else sentence
        lines.append(f"| `{name}` | `{shown}` | {outcome if honoured else 'refused'} | {remark} |")
    return "\n".join(lines) + "\n"


def test_no_field_is_missing() -> None:
    assert set(vars(GenerationConfig())) <= set(EXAMPLES) | set(RECORDS)
    assert set(EXAMPLES) | set(RECORDS) == set(FIELDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_field_goes_the_way_that_is_written(name: str) -> None:
    outcome = read(name)
    if FIELDS[name].path == "refused":
        assert outcome.startswith(f"{name}=")
        assert outcome.endswith(f"is not supported: {FIELDS[name].why}")
    else:
        assert outcome == FIELDS[name].path


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    if transformers.__version__ != DOCUMENTED_VERSION:
        pytest.skip(f"the page is of transformers {DOCUMENTED_VERSION}")
    if request.config.getoption("--write-docs"):
        DOCUMENT.write_text(table())
    assert DOCUMENT.read_text() == table(), "run pytest --write-docs on this test"


def examples() -> list[Any]:
    cases = [pytest.param(name, None, id=name) for name in HONOURED]
    return [*cases, *(pytest.param(name, value, id=f"{name}-2") for name, value in BOTH.items())]


def tokens_of(output: Tensor | EFTOutput) -> Tensor:
    return output if isinstance(output, Tensor) else output.sequences


@pytest.mark.parametrize(("name", "value"), examples())
def test_speculation_gives_the_tokens_of_naive_decoding(name: str, value: Any, models: EFTModels) -> None:
    prompts, options = asked(name, value)
    naive = NaiveEFTDecoder(models)
    shared = EFTDecoder(models, EFTConfig(acceptance="shared_seed", draft_tokens=3))
    sampled = {"do_sample": True, **options, "seed": 5}
    wanted = naive.generate(**prompts, **sampled)
    assert torch.equal(tokens_of(shared.generate(**prompts, **sampled)), tokens_of(wanted))
    if not options.get("do_sample"):
        block = EFTDecoder(models, EFTConfig(draft_tokens=4))
        wanted, output = naive.generate(**prompts, **options), block.generate(**prompts, **options)
        assert torch.equal(tokens_of(output), tokens_of(wanted))
    if name in ("output_scores", "output_logits"):
        assert isinstance(wanted, EFTOutput)
        assert isinstance(output, EFTOutput)
        for one, other in zip(getattr(output, name[7:]), getattr(wanted, name[7:]), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# Where transformers itself does something else at the same call; the rest must agree with it.
UNLIKE = {"num_return_sequences", "do_sample", "bos_token_id", "max_time"}
GREEDY = [name for name in HONOURED if name not in UNLIKE and not EXAMPLES[name][1].get("do_sample")]


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, None) for name in GREEDY), *BOTH.items()],
    ids=[*GREEDY, *(f"{name}-2" for name in BOTH)],
)
def test_where_the_target_is_the_large_model_transformers_gives_the_same(
    name: str, value: Any, large_alone: EFTModels
) -> None:
    """With F = B the target is L: greedy tokens, and scores, are those of plain transformers."""
    prompts, options = asked(name, value)
    # transformers goes on with a sequence that a string has stopped unless some token ends sequences.
    options.setdefault("eos_token_id", 96)
    options.setdefault("pad_token_id", 0)
    text = {"tokenizer": large_alone.tokenizer} if name == "stop_strings" else {}
    mask = {"attention_mask": torch.ones_like(prompts["input_ids"])} | prompts
    wanted = large_alone.large_base.generate(**mask, **options, **text)
    output = EFTDecoder(large_alone, EFTConfig(draft_tokens=4)).generate(**mask, **options)
    assert torch.equal(tokens_of(output), tokens_of(wanted))
    # The others of this path change the scores at most.
    unchanged = ("renormalize_logits", "remove_invalid_values", "output_scores", "output_logits")
    if FIELDS[name].path == "general" and name not in unchanged:
        plain = large_alone.large_base.generate(**mask, **{**options, name: None})
        assert not torch.equal(tokens_of(plain), tokens_of(wanted)), "the example changes nothing"
    if name in ("output_scores", "output_logits"):
        assert isinstance(output, EFTOutput)
        rows = zip(getattr(output, name[7:]), getattr(wanted, name[7:]), strict=True)
        for position, (ours, theirs) in enumerate(rows):
            live = (output.sequences[:, 11 + position :] != 0).any(dim=1)
            torch.testing.assert_close(ours[live], theirs[live], atol=1e-4, rtol=0)


SAMPLED = [name for name in HONOURED if EXAMPLES[name][1].get("do_sample") and name != "num_return_sequences"]


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_filters_leave_the_scores_of_transformers(name: str, large_alone: EFTModels) -> None:
    """The first token's scores after every filter, where the target is the large model's law."""
    prompts, options = asked(name)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": 96, "pad_token_id": 0}
    options = {**options, **wanted, "max_new_tokens": 1}
    theirs = large_alone.large_base.generate(**prompts, **options).scores[0]
    output = EFTDecoder(large_alone).generate(**prompts, **options)
    assert isinstance(output, EFTOutput)
    assert output.scores is not None
    assert torch.equal(output.scores[0].isneginf(), theirs.isneginf())
    torch.testing.assert_close(output.scores[0], theirs, atol=1e-4, rtol=0)
    everything = large_alone.large_base.generate(**prompts, **{**options, name: None}).scores[0]
    assert not torch.equal(everything, theirs), "the example changes nothing"


class AddsBias(LogitsProcessor):
    """Favours the id after the last one."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.scatter_add(1, (input_ids[:, -1:] + 1) % VOCAB, torch.full((len(scores), 1), 3.0))


def allowed(row: int, tokens: Tensor) -> list[int]:
    return list(range(row % 3, VOCAB, 3)) if len(tokens) % 2 else list(range(VOCAB))


@pytest.mark.parametrize(
    "own", [{"logits_processor": [AddsBias()]}, {"prefix_allowed_tokens_fn": allowed}], ids=["bias", "prefix"]
)
def test_the_callers_own_processors(own: dict[str, Any], models: EFTModels, large_alone: EFTModels) -> None:
    prompts = ragged_prompts(3)
    options = {"max_new_tokens": 12, "eos_token_id": 96, "pad_token_id": 0, **own}
    wanted = NaiveEFTDecoder(models).generate(**prompts, seed=2, do_sample=True, **options)
    shared = EFTDecoder(models, EFTConfig(acceptance="shared_seed", draft_tokens=3))
    assert torch.equal(shared.generate(**prompts, seed=2, do_sample=True, **options), wanted)
    theirs = large_alone.large_base.generate(**prompts, **options)
    assert torch.equal(EFTDecoder(large_alone).generate(**prompts, **options), theirs)
    assert not torch.equal(theirs, large_alone.large_base.generate(**prompts, max_new_tokens=12))


def test_the_general_path_is_reported_once(models: EFTModels, caplog: pytest.LogCaptureFixture) -> None:
    decoder = EFTDecoder(models)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            decoder.generate(
                torch.tensor([[5]]), max_new_tokens=2, repetition_penalty=1.2, suppress_tokens=[4]
            )
    (message,) = caplog.messages
    assert message.startswith("repetition_penalty, suppress_tokens: ")


def test_a_batch_that_was_not_expected_is_reported_once(
    models: EFTModels, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, costs = torch.tensor([[5]]).repeat(4, 1), {"cost_ratio": 0.2, "row_cost": 0.1}
    with caplog.at_level(logging.WARNING):
        for config in (EFTConfig(expected_batch=4, **costs), EFTConfig(draft_tokens=2), EFTConfig(**costs)):
            decoder = EFTDecoder(models, config)
            for _ in range(2):
                decoder.generate(prompts, max_new_tokens=2)
    (message,) = caplog.messages
    assert message.startswith("a batch of 4, ") and "EFTConfig(expected_batch=4)" in message


def test_drafts_made_with_the_processors_are_accepted(models: EFTModels) -> None:
    """Drafts that ignored a constraint to a third of the vocabulary would mostly be refused."""
    decoder = EFTDecoder(models, EFTConfig(acceptance="token", draft_tokens=3))
    output = decoder.generate(
        torch.tensor([[5, 6]]).repeat(40, 1),
        seed=0,
        do_sample=True,
        max_new_tokens=16,
        suppress_tokens=list(range(30, VOCAB)),
        return_dict_in_generate=True,
    )
    assert isinstance(output, EFTOutput)
    assert output.stats is not None
    assert output.stats.acceptance_rate > 0.5
    assert output.stats.acceptance_rate == pytest.approx(output.stats.expected_acceptance, abs=0.06)


def test_a_models_own_config_counts_and_what_plain_decoding_does_not_read_is_let_pass() -> None:
    models = tiny_trio("llama")
    own = models.large_base.generation_config
    own.no_repeat_ngram_size = 1
    own.num_assistant_tokens = 7
    own.length_penalty = 0.5
    output = EFTDecoder(models).generate(torch.tensor([[5, 6]]), max_new_tokens=20)
    assert isinstance(output, Tensor)
    assert len(set(output[0].tolist())) == 22
    repeated = EFTDecoder(models).generate(torch.tensor([[5, 6]]), max_new_tokens=20, no_repeat_ngram_size=0)
    assert len(set(repeated[0].tolist())) < 22
    with pytest.raises(ValueError, match=r"length_penalty=2\.0 is not supported"):
        EFTDecoder(models).generate(torch.tensor([[5, 6]]), length_penalty=2.0)


def test_a_penalty_on_ends_is_ignored_where_nothing_ends_sequences(models: EFTModels) -> None:
    options = {"max_new_tokens": 6, "eos_token_id": None, "repetition_penalty": 1.2}
    output = EFTDecoder(models).generate(
        torch.tensor([[5, 6]]), **options, exponential_decay_length_penalty=(1, 1.2)
    )
    assert torch.equal(output, EFTDecoder(models).generate(torch.tensor([[5, 6]]), **options))


@pytest.mark.parametrize("ends", [[VOCAB + 4], [-1], [VOCAB, 21, 89, 18]], ids=str)
def test_a_penalty_on_ends_is_of_those_in_the_vocabulary(ends: list[int]) -> None:
    """Those of a tuned model may be tokens that the bases do not have."""
    models = tiny_trio("llama")
    for model, own in ((models.large_base, None), (models.small_base, None), (models.small_tuned[0], ends)):
        model.generation_config.eos_token_id = own
    prompts, options = ragged_prompts(3), {"max_new_tokens": 24, "pad_token_id": 0, "seed": 1}
    within = [token for token in ends if 0 <= token < VOCAB]
    penalty = {"exponential_decay_length_penalty": (3, 1.3)}
    named = {**options, "eos_token_id": within}
    for decoder in (NaiveEFTDecoder(models), EFTDecoder(models, EFTConfig(draft_tokens=3))):
        output = decoder.generate(**prompts, **options, **penalty)
        assert torch.equal(output, decoder.generate(**prompts, **named, **penalty))
        without = decoder.generate(**prompts, **named)
        assert torch.equal(output, without) == (not within)


def test_a_keyword_of_none_takes_an_option_back(models: EFTModels) -> None:
    given = torch.tensor([[5, 6]])
    decoder = EFTDecoder(models)
    options = {"seed": 3, "do_sample": True, "max_new_tokens": 30}
    everything = decoder.generate(given, **options, top_k=0, eos_token_id=[])
    assert torch.equal(decoder.generate(given, **options, top_k=None, eos_token_id=None), everything)
