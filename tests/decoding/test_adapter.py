"""Inside transformers: every way of calling gives the same tokens for one seed, streamed or returned."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from speculative_eft.decoding import CUSTOM_GENERATE_FOLDER, EFTConfig, EFTDecoder, EFTOutput, NaiveEFTDecoder
from speculative_eft.decoding.output import CACHE_FIELD
from speculative_eft.models import EFTModels

from ..tiny_models import VOCAB, ragged_prompts, tiny_trio
from ..tokenizers_of_words import word_tokenizer
from .test_chat import prefilled


class Favours(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, self.token] += 2.0
        return scores


class EndsAtLength(StoppingCriteria):
    """Ends the first row at one length and the others at another."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        bound = torch.full((len(input_ids),), 18)
        bound[0] = 14
        return input_ids.shape[1] >= bound


def allowed(row: int, tokens: Tensor) -> list[int]:
    return list(range(row % 2, VOCAB, 2))


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "filters": {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "ends": {"do_sample": True, "eos_token_id": [21, 89, 18], "pad_token_id": 3},
    "minimum": {"min_new_tokens": 6, "do_sample": True},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "suppress_tokens": [21]},
    "own": {"logits_processor": [Favours(4)], "bad_words_ids": [[21], [5, 6]], "do_sample": True},
    "same_class": {"logits_processor": [MinLengthLogitsProcessor(15, 1)], "min_length": 12},
    "prefix": {"prefix_allowed_tokens_fn": allowed, "do_sample": True},
    "criteria": {"stopping_criteria": [EndsAtLength()], "do_sample": True, "pad_token_id": 0},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "several_prefixed": {"num_return_sequences": 2, "do_sample": True, "prefix_allowed_tokens_fn": allowed},
    "watermark": {"watermarking_config": {"bias": 3.0}, "do_sample": True},
    "max_length": {"max_length": 20, "max_new_tokens": None},
    "none": {"do_sample": True, "top_k": None, "eos_token_id": None},
    "config": {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=True, top_k=5)},
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> EFTModels:
    models = tiny_trio("llama")
    models.tokenizer = word_tokenizer(VOCAB)
    # The tuned model's end of a turn ends sequences whatever the large base's own config says.
    models.small_tuned[0].generation_config.eos_token_id = [1, 93]
    return models


@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_of_calling_gives_the_same_tokens(name: str, models: EFTModels) -> None:
    prompts = ragged_prompts(3)
    options = {"max_new_tokens": 12, **OPTIONS[name], "seed": 4}
    if "generation_config" in options:
        del options["max_new_tokens"]
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    large = models.large_base
    wanted = decoder.generate(**prompts, **options)
    calls = {
        "function": {"custom_generate": decoder.custom_generate},
        "folder": {"custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "decoder": decoder},
        "folder with models": {
            "custom_generate": CUSTOM_GENERATE_FOLDER,
            "trust_remote_code": True,
            "small_tuned": models.small_tuned,
            "small_base": models.small_base,
            "eft_config": decoder.config,
        },
    }
    for how, arguments in calls.items():
        output = large.generate(**prompts, **options, **arguments)
        assert torch.equal(output, wanted), how
    shared = EFTDecoder(models, EFTConfig(draft_tokens=3, acceptance="shared_seed"))
    naive = NaiveEFTDecoder(models).generate(**prompts, **options)
    assert torch.equal(large.generate(**prompts, **options, custom_generate=shared.custom_generate), naive)


OWN: dict[str, Any] = {
    "top_k": 4, "top_p": 0.3, "min_p": 0.5, "temperature": 0.2, "repetition_penalty": 1.9,
    "eos_token_id": list(range(2, 40)), "pad_token_id": 3, "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(30, 101)), "max_new_tokens": 12,
}  # fmt: skip


@pytest.mark.parametrize("style", ["keywords", "config"])
@pytest.mark.parametrize("names", [*([name] for name in OWN), [*OWN]], ids=",".join)
def test_none_takes_an_option_back_inside_transformers(
    names: list[str], style: str, models: EFTModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a keyword does, of what the large base's own config says; None in a config leaves it to that."""
    for name in names:
        monkeypatch.setattr(models.large_base.generation_config, name, OWN[name])
    monkeypatch.setattr(models.small_tuned[0].generation_config, "eos_token_id", list(range(40, 50)))
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    prompts, options = ragged_prompts(3), {"do_sample": True, "max_length": 35}
    nones = dict.fromkeys(names)
    given: dict[str, Any] = {**options, **nones}
    if style == "config":
        given = {"generation_config": GenerationConfig(**given)}
    folder = {"custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "decoder": decoder}
    changed = []
    for seed in range(3):
        wanted = decoder.generate(**prompts, **given, seed=seed)
        for how in (folder, {"custom_generate": decoder.custom_generate}):
            assert torch.equal(models.large_base.generate(**prompts, **given, **how, seed=seed), wanted)
        changed.append(not torch.equal(wanted, decoder.generate(**prompts, **options, seed=seed)))
    assert any(changed) == (style == "keywords")


def test_none_takes_an_option_back_in_a_pipeline(models: EFTModels, monkeypatch: pytest.MonkeyPatch) -> None:
    own = models.large_base.generation_config
    for name in ("top_k", "eos_token_id"):
        monkeypatch.setattr(own, name, OWN[name])
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "temperature": None, "seed": 2}
    generator = pipeline(
        "text-generation", models.large_base, tokenizer=models.tokenizer, device="cpu",
        custom_generate=decoder.custom_generate, **options,
    )  # fmt: skip
    ids = torch.tensor([models.tokenizer("w5 w6 w7").input_ids])
    lengths = []
    for nones in ({}, {"top_k": None}, {"eos_token_id": None}, {"top_k": None, "eos_token_id": None}):
        (text,) = generator("w5 w6 w7", return_tensors=True, **nones)
        wanted = decoder.generate(ids, **options, **nones)
        assert text["generated_token_ids"] == wanted[0].tolist()
        lengths.append(wanted.shape[1])
    assert lengths[0] < lengths[2] == lengths[3] == 23


@pytest.mark.parametrize("max_time", [None, 600.0])
def test_a_call_may_take_longer_than_the_models_own_time(
    max_time: float | None, models: EFTModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.large_base.generation_config, "max_time", 1e-9)
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    call = {"eos_token_id": 96, "max_new_tokens": 8, "custom_generate": decoder.custom_generate}
    ids = torch.tensor([[5, 6]])
    assert models.large_base.generate(ids, **call).shape[1] == 3
    assert models.large_base.generate(ids, **call, max_time=max_time).shape[1] == 10


def test_without_an_own_end_the_ends_of_all_models_count_inside_transformers() -> None:
    """None that is the large base's own value too is not told from what nobody said."""
    models = tiny_trio("llama")
    models.large_base.generation_config.eos_token_id = None
    models.small_tuned[0].generation_config.eos_token_id = list(range(1, 60))
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    ids, given = torch.tensor([[5, 6]]), {"do_sample": True, "max_new_tokens": 30, "seed": 1}
    wanted = decoder.generate(ids, **given)
    assert wanted.shape[1] < 32
    for named in ({}, {"eos_token_id": None}):
        output = models.large_base.generate(ids, **given, **named, custom_generate=decoder.custom_generate)
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_narrow_types_go_on_in_64_bits(dtype: torch.dtype) -> None:
    models = tiny_trio("llama", vocab_size=5000)
    decoder, large = EFTDecoder(models), models.large_base
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    given = {
        "input_ids": ids.to(dtype), "attention_mask": torch.ones_like(ids), "max_new_tokens": 6,
        "eos_token_id": 4998, "pad_token_id": 4999,
    }  # fmt: skip
    folder = {"custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "decoder": decoder}
    for own in ({}, {"tuned_input_ids": ids.flip(0).to(dtype)}):
        for stopping in (None, [lambda ids, scores: torch.tensor([ids.shape[1] > 5, False])]):
            options = {**given, **own, "stopping_criteria": stopping}
            wanted = decoder.generate(**{**options, "input_ids": ids})
            assert wanted[:, 3:].max() > 255
            for output in (
                decoder.generate(**options),
                large.generate(**options, custom_generate=decoder.custom_generate),
                large.generate(**options, **folder),
            ):
                assert output.dtype == torch.int64
                assert torch.equal(output, wanted)


def test_each_prompts_returns_have_its_own_prompt_of_the_tuned_models(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {
        "max_new_tokens": 8, "seed": 4, "do_sample": True, "num_return_sequences": 2,
        "tuned_input_ids": torch.tensor([[0, 9, 8], [30, 31, 32]]),
        "tuned_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }  # fmt: skip
    ids = torch.tensor([[5, 6], [7, 8]])
    wanted = decoder.generate(ids, **options)
    output = models.large_base.generate(ids, **options, custom_generate=decoder.custom_generate)
    assert torch.equal(output, wanted)


def test_the_folder_keeps_one_decoder_of_its_models(models: EFTModels) -> None:
    arguments = {
        "custom_generate": CUSTOM_GENERATE_FOLDER,
        "trust_remote_code": True,
        "small_tuned": models.small_tuned[0],
        "small_base": models.small_base,
        "max_new_tokens": 3,
    }
    ids = torch.tensor([[5, 6]])
    models.large_base.generate(ids, **arguments)
    first = vars(models.large_base)["_speculative_eft"]
    models.large_base.generate(ids, **arguments)
    assert vars(models.large_base)["_speculative_eft"] is first
    config = EFTConfig(beta=3.0, draft_tokens=2)
    other = models.large_base.generate(ids, **arguments, eft_config=config)
    assert torch.equal(other, EFTDecoder(models, config).generate(ids, max_new_tokens=3))
    assert vars(models.large_base)["_speculative_eft"].decoder.config is config
    assert not any("speculative" in name for name, _ in models.large_base.named_modules())


def test_a_model_that_keeps_a_decoder_is_copied_and_saved_without_it(tmp_path: Path) -> None:
    models = tiny_trio("llama")
    large, ids = models.large_base, torch.tensor([[5, 6]])
    arguments = {
        "custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "max_new_tokens": 6,
        "small_tuned": models.small_tuned[0], "small_base": models.small_base,
    }  # fmt: skip
    wanted = large.generate(ids, **arguments)
    kept = vars(large)["_speculative_eft"]
    torch.save(large, tmp_path / "large.pt")
    loaded = torch.load(tmp_path / "large.pt", weights_only=False)
    for other in (copy.copy(large), copy.deepcopy(large), pickle.loads(pickle.dumps(large)), loaded):
        assert torch.equal(other.generate(ids, **arguments), wanted)
        assert vars(other)["_speculative_eft"].decoder.models.large_base is other
    assert b"speculative_eft." not in pickle.dumps(large)
    assert vars(large)["_speculative_eft"] is kept
    alive = weakref.ref(large)
    del models, large, kept, other, loaded, arguments
    gc.collect()
    assert alive() is None


def test_a_prompt_with_pad_tokens_inside_and_its_mask_of_ones(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    ids = torch.tensor([[0, 0, 5, 0, 6]])
    options: dict[str, Any] = {"pad_token_id": 0, "max_new_tokens": 8, "eos_token_id": 1}
    inferred = decoder.generate(ids, **options)
    seen = decoder.generate(ids, torch.ones_like(ids), **options)
    large = models.large_base
    assert torch.equal(large.generate(ids, custom_generate=decoder.custom_generate, **options), inferred)
    with_mask = large.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=decoder.custom_generate, **options
    )
    assert torch.equal(with_mask, seen)
    assert not torch.equal(inferred, seen)


@pytest.mark.parametrize(
    ("own_end", "named", "is_padding"),
    [(None, {}, True), (0, {}, False), (1, {}, True), (0, {"eos_token_id": 1}, True),
     (None, {"eos_token_id": [1, 0]}, False)],
)  # fmt: skip
def test_padding_is_inferred_as_transformers_does_for_the_large_base(
    own_end: int | None, named: dict[str, Any], is_padding: bool
) -> None:
    """What ends sequences of the tuned model plays no part."""
    models = tiny_trio("llama")
    large, own = models.large_base, models.large_base.generation_config
    own.pad_token_id, own.eos_token_id = 0, own_end
    models.small_tuned[0].generation_config.eos_token_id = 0
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    ids = torch.tensor([[0, 0, 3, 4]])
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **named}
    mask = (ids != 0).long() if is_padding else torch.ones_like(ids)
    wanted = decoder.generate(ids, mask, **options)
    folder = {"custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "decoder": decoder}
    for output in (
        decoder.generate(ids, **options),
        large.generate(ids, **options, custom_generate=decoder.custom_generate),
        large.generate(ids, **options, **folder),
    ):
        assert torch.equal(output.sequences, wanted.sequences)
        torch.testing.assert_close(output.trace.target, wanted.trace.target, atol=1e-5, rtol=0)


def test_pipeline(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 9, "seed": 2}
    generator = pipeline(
        "text-generation",
        model=models.large_base,
        tokenizer=models.tokenizer,
        device="cpu",
        custom_generate=decoder.custom_generate,
    )
    (given,) = generator("w5 w6 w7", return_tensors=True, **options)
    # The pipeline's own defaults: a temperature of 0.7.
    direct = decoder.generate(torch.tensor([[5, 6, 7]]), temperature=0.7, **options)
    assert given["generated_token_ids"] == direct[0].tolist()
    (text,) = generator("w5 w6 w7", **options)
    assert text["generated_text"].startswith("w5 w6 w7w")


def test_outputs_of_both_ways_have_scores_statistics_and_trace(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {
        "max_new_tokens": 8, "seed": 1, "do_sample": True, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "eos_token_id": 96, "pad_token_id": 0,
    }  # fmt: skip
    prompts = ragged_prompts(3)
    direct = decoder.generate(**prompts, **options)
    output = models.large_base.generate(**prompts, **options, custom_generate=decoder.custom_generate)
    assert isinstance(direct, EFTOutput)
    assert isinstance(output, EFTOutput)
    assert output.stats is not None
    assert output.scores is not None
    assert output.logits is not None
    assert torch.equal(output.sequences, direct.sequences)
    assert len(output.scores) == len(output.logits) == 8
    assert {tuple(rows.shape) for rows in (*output.scores, *output.logits)} == {(3, VOCAB)}
    # transformers' own reading of scores, against the trace.
    transitions = models.large_base.compute_transition_scores(
        output.sequences, output.scores, normalize_logits=True
    )
    assert output.trace is not None
    torch.testing.assert_close(transitions, output.trace.target, atol=1e-4, rtol=0)


def test_re_use_of_the_caches_inside_transformers(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": True, "return_dict_in_generate": True, "eos_token_id": 96,
        "custom_generate": decoder.custom_generate,
    }  # fmt: skip
    first = models.large_base.generate(torch.tensor([[5, 6, 7]]), seed=0, **options)
    longer = torch.cat([first.sequences, torch.tensor([[8, 9]])], dim=1)
    with prefilled(decoder) as counts:
        second = models.large_base.generate(
            longer, seed=1, **options, **{CACHE_FIELD: getattr(first, CACHE_FIELD)}
        )
    # The last generated token and the first of the two new ones.
    assert counts == [2] * 3
    assert torch.equal(second.sequences, models.large_base.generate(longer, seed=1, **options).sequences)


def test_text_streamers(models: EFTModels, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "seed": 6}
    ids = torch.tensor([[5, 6]])
    wanted = models.tokenizer.decode(decoder.generate(ids, **options)[0])
    decoder.generate(ids, **options, streamer=TextStreamer(models.tokenizer))
    assert capsys.readouterr().out == wanted + "\n"

    iterator = TextIteratorStreamer(models.tokenizer, timeout=60)
    thread = Thread(target=decoder.generate, args=(ids,), kwargs={**options, "streamer": iterator})
    thread.start()
    assert "".join(iterator) == wanted
    thread.join()

    assert torch.equal(decoder.generate(inputs=ids, **options), decoder.generate(ids, **options))
    models.large_base.generate(
        ids, **options, custom_generate=decoder.custom_generate, eft_streamer=TextStreamer(models.tokenizer)
    )
    assert capsys.readouterr().out == wanted + "\n"


def test_stop_strings_inside_transformers(models: EFTModels) -> None:
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    ids = torch.tensor([[5, 6]])
    free = decoder.generate(ids, max_new_tokens=12)
    strings = [f"w{int(free[0, 6])}"]
    stopped = decoder.generate(ids, max_new_tokens=12, stop_strings=strings)
    assert stopped.shape[1] <= 7
    large = models.large_base
    arguments: dict[str, Any] = {"max_new_tokens": 12, "custom_generate": decoder.custom_generate}
    assert torch.equal(large.generate(ids, eft_stop_strings=strings, **arguments), stopped)
    folder = {"custom_generate": CUSTOM_GENERATE_FOLDER, "trust_remote_code": True, "decoder": decoder}
    output = large.generate(
        ids, max_new_tokens=12, stop_strings=strings, tokenizer=models.tokenizer, **folder
    )
    assert torch.equal(output, stopped)


SEVERAL: dict[str, Any] = {"num_return_sequences": 2, "do_sample": True}
OWN_PROMPT = {"tuned_input_ids": torch.tensor([[5]])}


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("num_beams=2 is not supported", {"num_beams": 2}),
        ("guidance_scale=1.5 is not supported", {"guidance_scale": 1.5}),
        ("penalty_alpha=0.6 is not supported", {"penalty_alpha": 0.6, "top_k": 4}),
        ("output_attentions=True is not supported", {"output_attentions": True}),
        ("inputs_embeds is not supported", {"inputs_embeds": torch.zeros(1, 2, 32)}),
        ("position_ids must count", {"position_ids": torch.tensor([[3, 4]])}),
        ("tuned_input_ids has 2 prompts for 1", {"tuned_input_ids": torch.ones(2, 2, dtype=torch.int64)}),
        ("tuned_input_ids must be an integer tensor", {"tuned_input_ids": [[1, 2]], **SEVERAL}),
        ("tuned_attention_mask must be a tensor", {**OWN_PROMPT, "tuned_attention_mask": [[1]], **SEVERAL}),
        ("must come from an output of this decoder", {CACHE_FIELD: filled_cache()}),
    ],
)
def test_what_cannot_be_honoured_inside_transformers(
    message: str, arguments: dict[str, Any], models: EFTModels
) -> None:
    decoder = EFTDecoder(models)
    call = {"max_new_tokens": 4, "custom_generate": decoder.custom_generate, **arguments}
    with pytest.raises(ValueError, match=message):
        models.large_base.generate(torch.tensor([[5, 6]]), **call)


def test_another_models_generate_is_refused(models: EFTModels) -> None:
    decoder = EFTDecoder(models)
    with pytest.raises(ValueError, match="decoder's own large_base"):
        models.small_base.generate(
            torch.tensor([[5, 6]]), max_new_tokens=3, custom_generate=decoder.custom_generate
        )
    with pytest.raises(ValueError, match="needs decoder=, or small_tuned= and small_base="):
        models.large_base.generate(
            torch.tensor([[5, 6]]), custom_generate=CUSTOM_GENERATE_FOLDER, trust_remote_code=True
        )
