"""Bodies made by torch.compile: the logits of the plain model, over the same cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.models import EFTModels, ModelRunner
from tests.models.families import tiny_model

from ..tiny_models import perturbed, ragged_prompts
from .test_attention import placed_model
from .test_runner import LENGTH, TOLERANCE, plain_logits, random_tokens

# torch's own, when it first imports what compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.compile traces and functionalises, without what compiles the graphs, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def assert_logits_are_the_models(family: str, both: bool = True, **options: Any) -> None:
    model = placed_model(family)
    tokens = random_tokens(2, LENGTH)
    expected = plain_logits(model, tokens)
    runner = ModelRunner(model, compile_body=True, **options)
    lengths = torch.tensor([5, 9])
    runner.reserve(2, LENGTH)
    runner.prefill(tokens[:, :9], lengths)
    storage = [tensor.data_ptr() for tensor in runner.cache.storage()]
    # The first of these is what its logits were compared with the model's for.
    for rows in (4, 1) if both else (4,):
        places = [slice(int(length), int(length) + rows) for length in lengths]
        block = torch.stack([tokens[index, place] for index, place in enumerate(places)])
        found = runner.forward(block, int(lengths.max()) + rows)
        wanted = torch.stack([expected[index, place] for index, place in enumerate(places)])
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
        runner.lengths.add_(rows)
        lengths = lengths + rows
    assert [tensor.data_ptr() for tensor in runner.cache.storage()] == storage


@pytest.mark.parametrize("family", ["gemma2", "falcon-multi-query"])
@pytest.mark.usefixtures("traced")
def test_traced_passes_give_the_models_logits(family: str) -> None:
    assert_logits_are_the_models(family)


@pytest.mark.usefixtures("traced")
def test_traced_passes_with_an_attention_that_takes_lengths(chosen: str) -> None:
    assert_logits_are_the_models("gpt-neox", attention=chosen)


def test_compiled_passes_give_the_models_logits() -> None:
    assert_logits_are_the_models("gpt2", both=False)


@pytest.mark.usefixtures("traced")
def test_speculation_by_a_traced_body_gives_the_tokens_of_naive_decoding() -> None:
    small = tiny_model("llama", 0), perturbed(tiny_model("llama", 0), 2, 0.02)
    given = {**ragged_prompts(2), "max_new_tokens": 12}
    wanted = NaiveEFTDecoder(EFTModels(tiny_model("gpt2", 0), small[1], small[0])).generate(**given)
    models = EFTModels(tiny_model("gpt2", 0), small[1], small[0], compile_bodies=True)
    assert torch.equal(EFTDecoder(models, EFTConfig(draft_tokens=3)).generate(**given), wanted)


def test_a_model_of_kernels_of_its_own_runs_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "compile")
    tokens, model = random_tokens(1, 4), tiny_model("llama")
    runner = ModelRunner(model, compile_body=True)
    runner.reserve(1, 4)
    torch.testing.assert_close(runner.forward(tokens, 4), plain_logits(model, tokens), rtol=0, atol=TOLERANCE)


def test_what_cannot_be_compiled_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    refusal = r"^GPT2LMHeadModel cannot be run by torch\.compile here; .*no compiler"
    with pytest.raises(ValueError, match=refusal):
        ModelRunner(tiny_model("gpt2"), compile_body=True)
