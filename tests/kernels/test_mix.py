"""The mix and its filters against float64 formulas and transformers' warpers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speculative_eft.kernels import Coefficients, Sampling, draft_logits, target_logits, warp

BATCH, ROWS, VOCAB = 3, 4, 50


def logits(seed: int, vocab_size: int = VOCAB, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(BATCH, ROWS, vocab_size, generator=generator)).to(dtype)


def coefficients(alpha: list[float], beta: float, top_p: float | None = None) -> Coefficients:
    alphas = torch.tensor(alpha).expand(BATCH, -1)
    return Coefficients(
        alpha=alphas,
        beta=torch.full((BATCH,), beta),
        draft_alpha=alphas,
        draft_base=1 - alphas.sum(1),
        conservative_top_p=None if top_p is None else torch.full((BATCH,), top_p),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [[1.0], [0.4], [0.3, 0.7], [1.2, -0.5]])
@pytest.mark.parametrize("beta", [1.0, 0.0, 1.7])
def test_target_and_draft(dtype: torch.dtype, alpha: list[float], beta: float) -> None:
    # The models' vocabularies are padded to different sizes.
    large, base = logits(0, VOCAB + 9, dtype), logits(1, VOCAB, dtype)
    tuned = [logits(2 + index, VOCAB + 2, dtype) for index in range(len(alpha))]
    mix = coefficients(alpha, beta)
    log_large, log_base, *log_tuned = (
        model[..., :VOCAB].double().log_softmax(-1) for model in (large, base, *tuned)
    )
    small = log_base + sum(a * (log - log_base) for a, log in zip(alpha, log_tuned, strict=True))
    target = small + beta * (log_large - log_base)
    assert target_logits(large, tuned, base, mix, VOCAB).shape[-1] == VOCAB
    for ours, wanted in (
        (draft_logits(tuned, base, mix, VOCAB), small),
        (target_logits(large, tuned, base, mix, VOCAB), target),
    ):
        torch.testing.assert_close(ours.double().log_softmax(-1), wanted.log_softmax(-1), atol=2e-5, rtol=0)


def test_conservative_filter_leaves_tokens_outside_the_set_their_draft_weight() -> None:
    large, tuned, base = logits(0), [logits(1)], logits(2)
    law = target_logits(large, tuned, base, coefficients([1.0], 1.0, top_p=0.6), VOCAB)
    draft = tuned[0].log_softmax(-1)
    delta = large.log_softmax(-1) - base.log_softmax(-1)
    order = draft.argsort(-1, descending=True)
    probability = draft.exp().gather(-1, order)
    inside = torch.zeros_like(draft, dtype=torch.bool).scatter(
        -1, order, probability.cumsum(-1) - probability < 0.6
    )
    torch.testing.assert_close(law, torch.where(inside, draft + delta, draft), atol=1e-5, rtol=0)


def test_a_model_without_a_say_is_not_consulted() -> None:
    nothing = torch.full_like(logits(0), -torch.inf)
    law = target_logits(nothing, [logits(1)], nothing, coefficients([1.0], 0.0), VOCAB)
    torch.testing.assert_close(law, logits(1))
    # Nor are tuned models by a draft law that is given, though all have a say in the target.
    mix = replace(coefficients([1.0], 1.0), draft_base=None, some_weight_is_zero=False)
    given = draft_logits([nothing], None, mix.of_given_draft, VOCAB, logits(1))
    torch.testing.assert_close(given, logits(1))


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("where", ["large", "tuned", "base", "base_and_large"])
def test_minus_infinity_never_makes_a_nan(where: str, top_p: float | None) -> None:
    large, tuned, base = logits(0), logits(1), logits(2)
    for name, model in (("large", large), ("tuned", tuned), ("base", base)):
        if name in where:
            model[..., 5:9] = -torch.inf
            model[1, 2] = -torch.inf
    mix = coefficients([1.0], 1.0, top_p)
    law = warp(target_logits(large, [tuned], base, mix, VOCAB), Sampling(torch.ones(BATCH)))
    assert not law.isnan().any()
    torch.testing.assert_close(law.exp().sum(-1), torch.ones(BATCH, ROWS))
    if top_p is None:
        assert (law[..., 5:9] == -torch.inf).all()


def test_nan_and_huge_logits() -> None:
    large, tuned, base = logits(0), logits(1), logits(2)
    large[0, 0, 3], tuned[0, 0, 4], base[0, 0, 5] = torch.nan, torch.inf, torch.nan
    large[0, 0, 7] = 1e4
    law = warp(
        target_logits(large, [tuned], base, coefficients([1.0], 1.0), VOCAB), Sampling(torch.ones(BATCH))
    )
    assert not law.isnan().any()
    assert law[0, 0].argmax() == 7


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.7, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.0, 0, 1.0, 1.0),
        (1.4, 20, 0.9, 0.02),
    ],
)
def test_warp_equals_transformers_warpers(
    temperature: float, top_k: int, top_p: float, min_p: float, ties: bool
) -> None:
    rows = logits(3)
    if ties and top_p == 1:
        rows = rows.round()
    wanted = TemperatureLogitsWarper(temperature)(None, rows.flatten(0, 1))
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    if min_p > 0:
        wanted = MinPLogitsWarper(min_p)(None, wanted)
    ours = warp(
        rows,
        Sampling(
            temperature=torch.full((BATCH,), temperature),
            top_k=torch.full((BATCH,), top_k or VOCAB),
            top_p=torch.full((BATCH,), top_p),
            min_p=torch.full((BATCH,), min_p),
        ),
    )
    torch.testing.assert_close(ours, wanted.view_as(ours).log_softmax(-1), atol=1e-5, rtol=0)


def test_top_p_that_is_met_exactly_cuts_the_lower_of_equal_ids() -> None:
    # A CPU's exponentials are exact here.
    rows = torch.tensor([[[0.5, 0.25, 0.25]]], device="cpu").log()
    ours = warp(rows, Sampling(torch.ones(1, device="cpu"), top_p=torch.tensor([0.75], device="cpu")))
    wanted = TopPLogitsWarper(0.75)(None, rows[0])
    assert wanted.isfinite().tolist() == [[True, False, True]]
    torch.testing.assert_close(ours, wanted[None].log_softmax(-1))


def test_parameters_are_per_sequence() -> None:
    rows = logits(4)
    sampling = Sampling(
        temperature=torch.tensor([0.5, 1.0, 2.0]),
        top_k=torch.tensor([1, VOCAB, 3]),
        top_p=torch.tensor([1.0, 0.5, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.2]),
    )
    together = warp(rows, sampling)
    for index in range(BATCH):
        alone = Sampling(
            *(
                getattr(sampling, name)[index : index + 1]
                for name in ("temperature", "top_k", "top_p", "min_p")
            )
        )
        torch.testing.assert_close(together[index : index + 1], warp(rows[index : index + 1], alone))
