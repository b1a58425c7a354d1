"""`score`: the target's log-probabilities of given tokens, in chunks of any length."""

from __future__ import annotations

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.decoding.prompts import read_prompts
from speculative_eft.decoding.scoring import score_tokens

from ..tiny_models import ragged_prompts, tiny_trio


@pytest.mark.parametrize("chunk", [64, 512])
def test_scores_are_those_of_plain_passes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end at multiples of 64, where a pass that looks at too little does not look at all."""
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    models = tiny_trio("llama", context=256)
    decoder = EFTDecoder(models, EFTConfig(0.8, 1.2, draft_tokens=2))
    given = ragged_prompts(2, 200)
    prompts = read_prompts(**given, vocab_size=decoder.vocab_size)
    coefficients = decoder._coefficients(2, decoder.runners.large.device)
    scores = score_tokens(decoder.runners, prompts, coefficients, decoder.vocab_size, chunk)
    assert scores.log_probs[0].isnan().all()
    ids = given["input_ids"][1:]
    with torch.no_grad():
        large, tuned, base = (
            model(ids).logits[:, :-1] for model in (models.large_base, *models.small_tuned, models.small_base)
        )
    law = (base + 0.8 * (tuned - base) + 1.2 * (large - base)).log_softmax(-1)
    wanted = law.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.log_probs[1:], wanted, atol=1e-4, rtol=0)
    assert torch.equal(scores.is_greedy[1], law[0].argmax(-1) == ids[0, 1:])


def test_scores_may_be_written_to_and_trained_on() -> None:
    scores = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=2)).score(**ragged_prompts(2))
    weight = torch.ones((), requires_grad=True)
    (weight * scores.log_probs.nan_to_num_(0.0)).sum().backward()
    torch.testing.assert_close(weight.grad, scores.log_probs.sum())
    scores.is_greedy.logical_not_()
