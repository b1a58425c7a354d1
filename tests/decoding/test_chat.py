"""Conversations, prompts of the tuned models' own, re-use of what the caches hold, and added tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import StoppingCriteria

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, EFTPast, NaiveEFTDecoder
from speculative_eft.decoding.chat import plain_chat
from speculative_eft.models import EFTModels, ModelRunner

from ..exactness.sampling import table_runners
from ..models.families import tiny_model
from ..table_models import random_tables
from ..tiny_models import perturbed, ragged_prompts, tiny_trio
from ..tokenizers_of_words import tokenizer_of

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
WORDS = ("User:", "Assistant:", "user", "assistant", "system", *(f"w{index}" for index in range(5, 101)))
ADDED = ("<|im_start|>", "<|im_end|>")
HELLO = [{"role": "user", "content": "w7 w8 w9"}]


def chat_trio(extra: int = 8) -> EFTModels:
    """A trio whose tuned model has `extra` tokens more than the bases, two of them its chat's."""
    models = EFTModels(
        large_base=perturbed(tiny_model("llama", 0), 1, 0.02),
        small_tuned=perturbed(tiny_model("llama", 3, 101 + extra), 2, 0.02),
        small_base=tiny_model("llama", 0),
        tokenizer=tokenizer_of(WORDS),
        chat_tokenizer=tokenizer_of((*WORDS, *ADDED)),
    )
    models.chat_tokenizer.chat_template = TEMPLATE
    return models


@contextmanager
def prefilled(decoder: EFTDecoder) -> Iterator[list[int]]:
    """Collects how many tokens each runner's prefill is given, in the order large, tuned, base."""
    counts: list[int] = []
    runners = (decoder.runners.large, *decoder.runners.tuned, decoder.runners.base)
    for runner in runners:

        def prefill(tokens: Tensor, *arguments: Any, plain: Any = runner.prefill) -> None:
            counts.append(tokens.numel())
            plain(tokens, *arguments)

        runner.prefill = prefill  # type: ignore[method-assign]
    yield counts
    for runner in runners:
        del runner.prefill


def test_the_plain_rendering() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    assert plain_chat(messages) == "Be brief.\nUser: Hi\nAssistant: Hello.\nUser: Why?\nAssistant:"


def test_each_model_gets_its_own_prompt() -> None:
    models = chat_trio()
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3))
    words = tokenizer_of((*WORDS, *ADDED))
    ids = words("User: w7 w8 w9 Assistant:", return_tensors="pt").input_ids
    tuned = words(
        "<|im_start|> user w7 w8 w9 <|im_end|> <|im_start|> assistant", return_tensors="pt"
    ).input_ids
    assert tuned.max() >= decoder.vocab_size
    # A template writes what begins a text itself: the tokenizer adds nothing to it.
    models.chat_tokenizer = copy.deepcopy(words)
    models.chat_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w50 $A", special_tokens=[("w50", words.convert_tokens_to_ids("w50"))]
    )
    options: dict[str, Any] = {"max_new_tokens": 10, "seed": 0, "do_sample": True}
    wanted = decoder.generate(ids, tuned_input_ids=tuned, **options)
    assert torch.equal(decoder.generate(chat=HELLO, **options), wanted)
    shouted = decoder.generate(chat=HELLO, chat_rendering=lambda messages: "w7 w8", **options)
    assert torch.equal(shouted, decoder.generate(torch.tensor([[7, 8]]), tuned_input_ids=tuned, **options))


@pytest.mark.parametrize("general", [{}, {"suppress_tokens": [3]}], ids=["fused", "general"])
@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_prompts_that_end_in_different_tokens(draft: Any, general: dict[str, Any]) -> None:
    """Greedy output against plain forwards of each model on its own prompt."""
    models = chat_trio()
    ids, tuned_ids = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 9, 5, 103, 8]])
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=3, draft=draft))
    options: dict[str, Any] = {"max_new_tokens": 12, "tuned_input_ids": tuned_ids, **general}
    output = decoder.generate(ids, **options)
    assert torch.equal(NaiveEFTDecoder(models).generate(ids, **options), output)
    with torch.no_grad():
        for _ in range(12):
            large, tuned, base = (
                model(given).logits[0, -1, :101].double()
                for model, given in (
                    (models.large_base, ids), (models.small_tuned[0], tuned_ids), (models.small_base, ids)
                )
            )  # fmt: skip
            mixed = large + tuned - base
            mixed[general.get("suppress_tokens", [])] = -torch.inf
            token = mixed.argmax().view(1, 1)
            ids, tuned_ids = torch.cat([ids, token], dim=1), torch.cat([tuned_ids, token], dim=1)
    assert torch.equal(output, ids)


def test_loading_finds_the_tuned_models_template(tmp_path: Path) -> None:
    models = chat_trio()
    words = tokenizer_of(WORDS)
    models.chat_tokenizer = tuned_words = copy.deepcopy(words)
    tuned_words.add_tokens(list(ADDED), special_tokens=True)
    tuned_words.chat_template = TEMPLATE
    tuned = models.small_tuned[0]
    for role, model, tokenizer in (
        ("large", models.large_base, words), ("tuned", tuned, tuned_words), ("base", models.small_base, words)
    ):  # fmt: skip
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    loaded = EFTModels.from_pretrained(*(tmp_path / role for role in ("large", "tuned", "base")))
    assert loaded.tokenizer.chat_template is None
    assert loaded.chat_tokenizer.chat_template == TEMPLATE
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 0, "do_sample": True}
    wanted = EFTDecoder(models).generate(chat=HELLO, **options)
    assert torch.equal(EFTDecoder(loaded).generate(chat=HELLO, **options), wanted)


def test_a_batch_of_chats_is_each_chat_alone() -> None:
    decoder = EFTDecoder(chat_trio(), EFTConfig(draft_tokens=3))
    chats = [HELLO, [{"role": "system", "content": "w50"}, {"role": "user", "content": "w9 w9 w9 w9 w10"}]]
    together = decoder.generate(chat=chats, seed=[3, 4], do_sample=True, max_new_tokens=10)
    for index, chat in enumerate(chats):
        alone = decoder.generate(chat=chat, seed=[3 + index], do_sample=True, max_new_tokens=10)
        assert torch.equal(together[index, -10:], alone[0, -10:])


def test_tuned_prompts_may_be_padded_on_the_left() -> None:
    models, prompts = tiny_trio("gpt2"), ragged_prompts(3)
    tuned = torch.tensor([[0, 0, 7, 8], [0, 9, 5, 6], [4, 5, 6, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    options: dict[str, Any] = {"seed": [1, 2, 3], "do_sample": True, "max_new_tokens": 10}
    decoder = EFTDecoder(models, EFTConfig(acceptance="shared_seed", draft_tokens=3))
    own = {"tuned_input_ids": tuned, "tuned_attention_mask": mask}
    together = decoder.generate(**prompts, **own, **options)
    assert torch.equal(together, NaiveEFTDecoder(models).generate(**prompts, **own, **options))
    length = int(mask[0].sum())
    alone = decoder.generate(
        prompts["input_ids"][:1, -1:], tuned_input_ids=tuned[:1, -length:], **{**options, "seed": [1]}
    )
    assert torch.equal(alone[0, 1:], together[0, -10:])
    several = decoder.generate(**prompts, **own, **{**options, "seed": 0}, num_return_sequences=2)
    each_twice = {name: rows.repeat_interleave(2, dim=0) for name, rows in {**prompts, **own}.items()}
    assert torch.equal(several, decoder.generate(**each_twice, **{**options, "seed": 0}))


@pytest.mark.parametrize("general", [{}, {"repetition_penalty": 1.2}], ids=["fused", "general"])
@pytest.mark.parametrize(
    "config",
    [
        EFTConfig(draft_tokens=4, draft_weights="own"),
        EFTConfig(draft_tokens=4, draft_weights="int8", draft="pair"),
        EFTConfig(draft_tokens="auto", cost_ratio=0.05, expected_batch=3),
        EFTConfig(draft_tokens=4, alpha=(0.4, 0.7)),
    ],
    ids=["own", "int8, pair", "auto", "two tuned models"],
)
def test_prompts_of_their_own_are_in_a_batch_what_they_are_alone(
    config: EFTConfig, general: dict[str, Any]
) -> None:
    """The second prompt ends in another token for the tuned models, the others end alike."""
    models = tiny_trio("llama")
    if len(config.alphas) > 1:
        others = [*models.small_tuned, tiny_trio("llama", scale=0.03).small_tuned[0]]
        models = EFTModels(models.large_base, others, models.small_base)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8], [5, 9, 5]])
    tuned = torch.tensor([[9, 4, 5], [6, 7, 9], [1, 2, 5]])
    options: dict[str, Any] = {
        "max_new_tokens": 12, "do_sample": True, "top_k": 0, "return_dict_in_generate": True, **general
    }  # fmt: skip
    decoder = EFTDecoder(models, config)

    def two_turns(rows: list[int]) -> list[tuple[Tensor, list[Any]]]:
        prompts = ids[rows], tuned[rows]
        seeds, past, turns = [row + 1 for row in rows], None, []
        for _ in range(2):
            output = decoder.generate(
                prompts[0], tuned_input_ids=prompts[1], seed=seeds, past_key_values=past, **options
            )
            past, added = output.past_key_values, output.sequences[:, -12:]
            turns.append((added, output.trace.source))
            prompts = tuple(torch.cat([own, added, own], dim=1) for own in prompts)
        return turns

    together = two_turns([0, 1, 2])
    for row in range(3):
        for (tokens, sources), (all_tokens, all_sources) in zip(two_turns([row]), together, strict=True):
            assert torch.equal(tokens[0], all_tokens[row])
            assert sources[0] == all_sources[row]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("general", [{}, {"repetition_penalty": 1.2}], ids=["fused", "general"])
def test_two_turns_with_re_use_give_a_cold_runs_tokens(
    backend: str, general: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", backend)
    models = chat_trio()
    options: dict[str, Any] = {
        "do_sample": True, "eos_token_id": [], "max_new_tokens": 9, "return_dict_in_generate": True
    }  # fmt: skip
    options.update(general)
    warm = EFTDecoder(models, EFTConfig(draft_tokens=3))
    first = warm.generate(chat=HELLO, seed=0, **options)
    assert isinstance(first, EFTOutput)
    assert isinstance(first.past_key_values, EFTPast)
    words = tokenizer_of(WORDS)
    answer = " ".join(words.convert_ids_to_tokens(first.sequences[0, -9:].tolist()))
    turns = [*HELLO, {"role": "assistant", "content": answer}, {"role": "user", "content": "w11 w12"}]
    with prefilled(warm) as counts:
        second = warm.generate(chat=turns, seed=1, past_key_values=first.past_key_values, **options)
    # The caches hold all of the first turn but its last token; each model's prompt goes on from there:
    # that token, <|im_end|> <|im_start|> user w11 w12 <|im_end|> <|im_start|> for the tuned model, whose
    # last word is not prefilled, and that token, User: w11 w12 for the bases.
    assert counts == [4, 8, 4]
    cold = EFTDecoder(chat_trio(), EFTConfig(draft_tokens=3))
    with prefilled(cold) as counts:
        wanted = cold.generate(chat=turns, seed=1, **options)
    assert counts == [17, 24, 17]
    assert isinstance(second, EFTOutput)
    assert isinstance(wanted, EFTOutput)
    assert torch.equal(second.sequences, wanted.sequences)


def test_the_same_prompt_again_with_its_past() -> None:
    """The caches hold all of it, and its last token runs again all the same."""
    decoder, ids = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3)), torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "eos_token_id": []}
    first = decoder.generate(ids, seed=0, return_dict_in_generate=True, **options)
    assert isinstance(first, EFTOutput)
    again = decoder.generate(ids, seed=1, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, decoder.generate(ids, seed=1, **options))


def test_re_use_where_one_row_begins_anew() -> None:
    """The other has little to fill, from far behind: what stands there for padding needs room too."""
    decoder = EFTDecoder(table_runners(random_tables(1, 6)), EFTConfig(draft_tokens=2))
    ids = torch.randint(6, (2, 60), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True}
    first = decoder.generate(ids, seed=0, return_dict_in_generate=True, **options)
    assert isinstance(first, EFTOutput)
    changed = first.sequences.clone()
    changed[1, 0] = (changed[1, 0] + 1) % 6
    again = decoder.generate(changed, seed=1, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, decoder.generate(changed, seed=1, **options))


def test_re_use_in_ragged_batches_that_grow_and_change() -> None:
    """Prompts that keep, cut and replace what is held, longer than the storage so far."""
    models, prompts = tiny_trio("qwen2"), ragged_prompts(4)
    options: dict[str, Any] = {
        "eos_token_id": [], "max_new_tokens": 9, "return_dict_in_generate": True, "do_sample": True
    }  # fmt: skip
    warm, cold = (EFTDecoder(models, EFTConfig(draft_tokens=4)) for _ in range(2))
    # The two share the models' runners: nothing is held once the other has run.
    first = warm.generate(**prompts, seed=0, **options)
    assert isinstance(first, EFTOutput)
    longer = torch.cat([first.sequences, torch.full((4, 25), 6)], dim=1)
    longer[1, -30:-20] = 9
    mask = torch.cat([prompts["attention_mask"], torch.ones(4, 34, dtype=torch.int64)], dim=1)
    with prefilled(warm) as counts:
        second = warm.generate(longer, mask, seed=1, past_key_values=first.past_key_values, **options)
    # Row 1 goes on from its eighth token and needs most: 29 of its 38, the last of which is not prefilled.
    assert counts == [4 * 29] * 3
    wanted = cold.generate(longer, mask, seed=1, **options)
    assert isinstance(second, EFTOutput)
    assert isinstance(wanted, EFTOutput)
    assert torch.equal(second.sequences, wanted.sequences)


class EndsByRow(StoppingCriteria):
    """Ends row i of a batch after 2 i + 2 new tokens, the last one first."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= 11 + 2 * torch.arange(len(input_ids), 0, -1)


@pytest.mark.parametrize("general", [{}, {"repetition_penalty": 1.2}], ids=["fused", "general"])
def test_re_use_after_rows_that_ended_at_different_times(general: dict[str, Any]) -> None:
    models, prompts = tiny_trio("llama"), ragged_prompts(4)
    options: dict[str, Any] = {
        "eos_token_id": [], "max_new_tokens": 12, "return_dict_in_generate": True, "do_sample": True,
        "pad_token_id": 0, **general,
    }  # fmt: skip
    warm, cold = (EFTDecoder(models, EFTConfig(draft_tokens=4)) for _ in range(2))
    first = warm.generate(**prompts, seed=0, stopping_criteria=[EndsByRow()], **options)
    assert isinstance(first, EFTOutput)
    ends = 11 + 2 * torch.arange(4, 0, -1)
    longer = torch.cat([first.sequences, torch.full((4, 5), 6)], dim=1)
    column = torch.arange(longer.shape[1])
    mask = ((column < ends[:, None]) | (column >= first.sequences.shape[1])).long()
    mask[:, :11] = prompts["attention_mask"]
    with prefilled(warm) as counts:
        second = warm.generate(longer, mask, seed=1, past_key_values=first.past_key_values, **options)
    # The last generated token and five more, of which the last is not prefilled.
    assert counts == [4 * 5] * 3
    wanted = cold.generate(longer, mask, seed=1, **options)
    assert isinstance(second, EFTOutput)
    assert isinstance(wanted, EFTOutput)
    assert torch.equal(second.sequences, wanted.sequences)


def test_a_past_that_another_decoder_of_the_models_overwrote() -> None:
    """Decoders of the same models share their caches."""
    models = tiny_trio("llama")
    options: dict[str, Any] = {
        "eos_token_id": [], "max_new_tokens": 9, "return_dict_in_generate": True, "do_sample": True
    }  # fmt: skip
    warm, other = (EFTDecoder(models, EFTConfig(draft_tokens=3)) for _ in range(2))
    first = warm.generate(torch.tensor([[5, 6, 7]]), seed=0, **options)
    assert isinstance(first, EFTOutput)
    longer = torch.cat([first.sequences, torch.tensor([[8, 9]])], dim=1)
    wanted = other.generate(longer, seed=1, **options)
    other.generate(torch.full((1, 20), 50), seed=2, **options)
    second = warm.generate(longer, seed=1, past_key_values=first.past_key_values, **options)
    assert isinstance(second, EFTOutput)
    assert isinstance(wanted, EFTOutput)
    assert torch.equal(second.sequences, wanted.sequences)


def test_a_past_of_other_models_does_no_harm() -> None:
    first, other = (
        EFTDecoder(table_runners(random_tables(seed, 6)), EFTConfig(draft_tokens=2)) for seed in (1, 2)
    )
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    past = first.generate(torch.tensor([[1, 2, 3]]), **options)
    other.generate(torch.tensor([[4, 4, 4]]), **options)
    # Both have been called once; the prompt goes on from what the first one's caches hold.
    found = other.generate(past.sequences, past_key_values=past.past_key_values, **options)
    assert torch.equal(found.sequences, other.generate(past.sequences, **options).sequences)


def test_an_old_past_does_no_harm() -> None:
    decoder = EFTDecoder(table_runners(random_tables(1, 6)), EFTConfig(draft_tokens=2))
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    first = decoder.generate(ids, seed=0, **options)
    assert isinstance(first, EFTOutput)
    other = decoder.generate(torch.tensor([[4, 4, 4, 4]]), seed=0, **options)
    assert isinstance(other, EFTOutput)
    again = decoder.generate(first.sequences, seed=2, past_key_values=first.past_key_values, **options)
    fresh = decoder.generate(first.sequences, seed=2, **options)
    assert isinstance(again, EFTOutput)
    assert isinstance(fresh, EFTOutput)
    assert torch.equal(again.sequences, fresh.sequences)
    # Another number of sequences, or no re-use wanted.
    both = first.sequences.repeat(2, 1)
    two = decoder.generate(both, past_key_values=fresh.past_key_values, **options)
    assert torch.equal(two.sequences, fresh.sequences.repeat(2, 1))
    none = decoder.generate(ids, use_cache=False, **options)
    assert isinstance(none, EFTOutput)
    assert none.past_key_values is None


def test_ids_that_only_the_tuned_model_has_are_never_produced() -> None:
    models = chat_trio()
    tuned = models.small_tuned[0]
    # As much as it likes to end its turn, the bases have no such token.
    with torch.no_grad():
        tuned.get_output_embeddings().weight[101:] *= 30
    decoder = EFTDecoder(models, EFTConfig(draft_tokens=4))
    assert decoder.vocab_size == 101
    output = decoder.generate(
        torch.full((64, 2), 7), seed=0, do_sample=True, top_k=0, max_new_tokens=12, temperature=2.0
    )
    assert isinstance(output, Tensor)
    assert output.max() < 101
    with pytest.raises(ValueError, match="input_ids holds the id 102, outside the vocabulary of 101 ids"):
        decoder.generate(torch.tensor([[102]]))
    with pytest.raises(ValueError, match="tuned_input_ids holds the id 109, outside the vocabulary of 109"):
        decoder.generate(torch.tensor([[1]]), tuned_input_ids=torch.tensor([[109]]))


def test_added_tokens_inside_every_models_rows_follow_the_law() -> None:
    """Padded rows of the bases take part with the logits they have: the law is L F / B for these ids too."""
    models = tiny_trio("qwen2")
    ids = torch.tensor([[5, 100, 7]])
    output = EFTDecoder(models).generate(ids, tuned_input_ids=ids, max_new_tokens=12)
    with torch.no_grad():
        for _ in range(12):
            large, tuned, base = (
                model(ids).logits[0, -1].double()
                for model in (models.large_base, *models.small_tuned, models.small_base)
            )
            ids = torch.cat([ids, (large + tuned - base).argmax().view(1, 1)], dim=1)
    assert torch.equal(output, ids)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("chat must be a list of messages", {"chat": [{"role": "user"}]}),
        ("chat must be a list of messages", {"chat": [[]]}),
        ("chat must be a list of messages", {"chat": {"role": "user", "content": "hello"}}),
        ("chat is empty", {"chat": []}),
        ("chat_rendering must give text", {"chat": HELLO, "chat_rendering": lambda messages: ""}),
        ("chat_rendering must give text", {"chat": HELLO, "chat_rendering": lambda messages: 3}),
        ("chat must be", {"chat": ["hello"]}),
        ("input_ids is given beside chat", {"chat": HELLO, "input_ids": torch.tensor([[5]])}),
        ("tuned_input_ids is given beside chat", {"chat": HELLO, "tuned_input_ids": torch.tensor([[5]])}),
        ("chat_rendering is given without chat", {"chat_rendering": plain_chat}),
        ("past_key_values must come from an output", {"past_key_values": 3}),
        ("tuned_attention_mask is given without", {"tuned_attention_mask": torch.ones(1, 1)}),
    ],
)
def test_bad_conversations(message: str, arguments: dict[str, Any]) -> None:
    call = arguments if "chat" in arguments else {"input_ids": torch.tensor([[5]]), **arguments}
    with pytest.raises(ValueError, match=message):
        EFTDecoder(chat_trio()).generate(**call)


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        EFTDecoder(tiny_trio("llama")).generate(chat=HELLO)
    models = chat_trio()
    for without in (None, tokenizer_of(WORDS[:20])):
        # None is what from_pretrained leaves where no tuned tokenizer has a template.
        models.chat_tokenizer = without
        with pytest.raises(ValueError, match=r"tokenizer has none: set models.chat_tokenizer"):
            EFTDecoder(models).generate(chat=HELLO)
    assert isinstance(models.runners().large, ModelRunner)
