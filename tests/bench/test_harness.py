"""The adapter for lm-evaluation-harness: likelihoods and generation of the target, against enumeration."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder

from ..exactness.laws import Law, next_token_law
from ..exactness.sampling import table_runners
from ..table_models import random_tables
from ..tokenizers_of_words import tokenizer_of

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

from speculative_eft.bench.harness import SpeculativeEFT

WORDS = ("a", "b", "c", "d", "e")
TABLES = random_tables(7, len(WORDS))
ALPHA, BETA = 0.8, 1.3


@pytest.fixture(scope="module")
def model() -> Any:
    decoder = EFTDecoder(table_runners(TABLES), EFTConfig(ALPHA, BETA, draft_tokens=3))
    return SpeculativeEFT(decoder=decoder, tokenizer=tokenizer_of(WORDS), max_length=12, batch_size=3)


def bounded(context: int) -> Any:
    """The same, where the models themselves end at `context` tokens."""
    runners = table_runners(TABLES)
    for runner in runners.every:
        runner.max_context = context
    decoder = EFTDecoder(runners, EFTConfig(ALPHA, BETA, draft_tokens=3))
    return SpeculativeEFT(decoder=decoder, tokenizer=tokenizer_of(WORDS))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def log_law(tokens: list[int]) -> np.ndarray:
    before, last = [0, *tokens][-2:]
    return np.log(next_token_law(TABLES, Law(alpha=(ALPHA,), beta=BETA), before, last))


def enumerated(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for index, token in enumerate(continuation):
        law = log_law([*context, *continuation[:index]])
        total += law[token]
        greedy &= int(law.argmax()) == token
    return float(total), greedy


def test_likelihoods(model: Any) -> None:
    cases = [("a b", " c"), ("c d e", " a a b"), ("b", " e d"), ("a", " a"), ("e e", " b c d a")]
    # The context is cut to the 11 words that leave room.
    cases.append(("a b c d e a b c a e d c", " b e"))
    found = model.loglikelihood(requests(*cases))
    for (context, continuation), (log_prob, greedy) in zip(cases, found, strict=True):
        ids = [[WORDS.index(word) for word in text.split()] for text in (context, continuation)]
        wanted = enumerated(*ids)
        assert log_prob == pytest.approx(wanted[0], abs=1e-4)
        assert greedy == wanted[1]


def test_likelihoods_of_everything_sum_to_one(model: Any) -> None:
    cases = [("b c", f" {one} {other}") for one in WORDS for other in WORDS]
    found = model.loglikelihood(requests(*cases))
    assert sum(math.exp(log_prob) for log_prob, _ in found) == pytest.approx(1.0, abs=1e-5)
    assert sum(greedy for _, greedy in found) == 1


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_continuation_may_be_as_long_as_all_that_the_models_read(more: int) -> None:
    model = bounded(8)
    context, continuation = [4, 2, 0, 1, 3, 1][: 1 + more], [2, 0, 4, 1, 3, 3, 0, 2]
    ((found, greedy),) = model._loglikelihood_tokens([(None, context, continuation)])
    # The last token is not read, which leaves room for one of the context.
    assert (pytest.approx(found, abs=1e-4), greedy) == enumerated(context[-1:], continuation)


def test_a_longer_continuation_is_refused_before_any_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bounded(8)
    monkeypatch.setattr(model, "decoder", None)
    with pytest.raises(ValueError, match="a continuation of 9 tokens exceeds max_length=8"):
        model._loglikelihood_tokens([(None, [1], [2]), (None, [1], [0] * 9)])


def test_a_context_without_tokens_is_that_of_no_text(model: Any) -> None:
    found = model._loglikelihood_tokens([(None, [], [2, 0]), (None, [model.prefix_token_id], [2, 0])])
    assert found[0] == found[1]


def test_rolling_likelihood_is_that_of_the_whole_text_in_windows(model: Any) -> None:
    words = list("abcdeabcaedcbadbeacdbead")
    (found,) = model.loglikelihood_rolling(requests((" ".join(words),)))
    ids = [WORDS.index(word) for word in words]
    prefix = model.prefix_token_id
    # Two windows of 12 tokens, as many as the models read.
    wanted = sum(log_law([prefix, *ids[:index]])[ids[index]] for index in range(12))
    wanted += sum(log_law(ids[11:index])[ids[index]] for index in range(12, 24))
    assert found == pytest.approx(float(wanted), abs=1e-3)
    assert bounded(12).loglikelihood_rolling(requests((" ".join(words),))) == [found]


def test_generation_is_the_targets_and_ends_before_a_string(model: Any) -> None:
    free, stopped = model.generate_until(
        requests(
            ("a b", {"until": [], "max_gen_toks": 6}),
            ("a b", {"until": ["zz"], "max_gen_toks": 6}),
        )
    )
    ids = [0, 1]
    for _ in range(6):
        ids.append(int(log_law(ids).argmax()))
    text = "".join(WORDS[token] for token in ids[2:])
    assert free == stopped == text
    until = text[3:5]
    (cut,) = model.generate_until(requests(("a b", {"until": until, "max_gen_toks": 6})))
    assert cut == text[: text.index(until)]


@pytest.mark.parametrize("nothing", [None, "", [""], [None]], ids=repr)
def test_nothing_is_no_string_to_end_with(model: Any, nothing: Any) -> None:
    def run(until: Any) -> Any:
        return model.generate_until(requests(("a b", {"until": until, "max_gen_toks": 6})))

    (free,) = run([])
    assert len(free) == 6 and run(nothing) == [free]
    until = free[3:5]
    assert run(["", until]) == run(until) != [free]


def test_prompts_are_cut_to_leave_room_for_what_is_generated() -> None:
    runners = table_runners(TABLES)
    for runner in (runners.large, *runners.small):
        runner.max_context = 12
    decoder = EFTDecoder(runners, EFTConfig(draft_tokens=2))
    model = SpeculativeEFT(decoder=decoder, tokenizer=tokenizer_of(WORDS))
    words = "a b c d e a b c a e d c b e"
    options = {"until": [], "max_gen_toks": 6}
    whole, cut = model.generate_until(requests((words, options), (words[-11:], options)))
    assert whole == cut and len(whole) == 6


def test_sampling_reproduces_and_batches_change_nothing() -> None:
    def run(batch_size: int) -> tuple[list[str], list[str]]:
        decoder = EFTDecoder(table_runners(TABLES), EFTConfig(draft_tokens=2))
        model = SpeculativeEFT(
            decoder=decoder, tokenizer=tokenizer_of(WORDS), max_length=20, batch_size=batch_size, seed=5
        )
        options = {"until": ["dd"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
        prompts = requests(*((text, options) for text in ("a", "b c", "d d e")))
        return model.generate_until(prompts), model.generate_until(prompts)

    once, again = run(1)
    assert once != again
    assert run(3) == (once, again)


def test_draft_lengths_are_chosen_for_the_batches_that_run() -> None:
    model = SpeculativeEFT.create_from_arg_string("demo=True", {"batch_size": 4})
    assert model.decoder.config == EFTConfig(expected_batch=4)


def test_scores_know_padding_on_either_side() -> None:
    decoder = EFTDecoder(table_runners(TABLES), EFTConfig(draft_tokens=2))
    ids = torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3]])
    scores = decoder.score(ids, torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]))
    assert torch.equal(scores.log_probs[0], scores.log_probs[1])
    assert scores.log_probs.shape == (2, 2)
    with pytest.raises(ValueError, match="input_ids holds the id 9"):
        decoder.score(torch.tensor([[9]]))


def test_the_harness_finds_the_model() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("speculative_eft") is SpeculativeEFT
    with pytest.raises(ValueError, match="model_args must name large_base, small_tuned and small_base"):
        SpeculativeEFT.create_from_arg_string("large_base=x")


@pytest.mark.parametrize(
    ("device", "there_is_cuda", "wanted"),
    [
        ("cuda:0", False, None),
        ("cuda", False, None),
        ("cuda:0", True, "cuda:0"),
        ("cpu", False, "cpu"),
        (None, False, None),
    ],
)
def test_the_harnesss_own_device_is_left_out_where_torch_has_no_cuda(
    device: str | None, there_is_cuda: bool, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def load(*_: Any, device_map: str | None, **__: Any) -> Any:
        asked.append(device_map)
        raise KeyboardInterrupt

    monkeypatch.setattr("speculative_eft.models.EFTModels.from_pretrained", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_cuda)
    with pytest.raises(KeyboardInterrupt):
        SpeculativeEFT.create_from_arg_string("large_base=l,small_tuned=f,small_base=b", {"device": device})
    assert asked == [wanted]
