"""Small random transformers through the real runner and cache: joint law against enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.kernels import AcceptanceRule
from speculative_eft.models import EFTModels

from ..device import skip_unless_compiled, test_device
from ..tiny_models import tiny_trio
from .laws import chi_square
from .sampling import Record, assert_exact, count_windows

VOCAB = 5
LENGTH = 4
COPIES = 6_000


def enumerate_law(models: EFTModels, prompt: list[int], config: EFTConfig) -> np.ndarray:
    """Probabilities of all continuations of LENGTH tokens, from full forwards in float64."""
    paths = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    rows = torch.cat([torch.tensor(prompt).expand(len(paths), -1), paths], dim=1)
    with torch.no_grad():
        large, tuned, base = (
            model(rows).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (models.large_base, *models.small_tuned, models.small_base)
        )
    target = (base + config.alpha * (tuned - base) + config.beta * (large - base)).log_softmax(-1)
    return target.gather(-1, paths[..., None])[..., 0].sum(1).exp().cpu().numpy()


def placed_trio(family: str, dtype: torch.dtype = torch.float32) -> EFTModels:
    models = tiny_trio(family, vocab_size=VOCAB, scale=0.05)
    for model in (models.large_base, *models.small_tuned, models.small_base):
        torch.nn.Module.to(model, test_device(), dtype)
    return models


def compare_joint_law(models: EFTModels, exact: EFTModels, config: EFTConfig, record: Record) -> None:
    """What `models` sample against the law of `exact`, the same ones, for two prompts in one batch."""
    prompts = ([2, 3], [4, 2, 2, 3, 4])
    ids = torch.tensor([[0, 0, 0, *prompts[0]], list(prompts[1])]).repeat_interleave(COPIES, 0)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5]).repeat_interleave(COPIES, 0)
    output = EFTDecoder(models, config).generate(
        ids, mask, seed=4, do_sample=True, top_k=0, eos_token_id=[], max_new_tokens=LENGTH + 2
    )
    assert isinstance(output, torch.Tensor)
    tokens = output[:, 5 : 5 + LENGTH].cpu().numpy()
    assert_exact(
        [
            chi_square(
                count_windows(tokens[index * COPIES : (index + 1) * COPIES], VOCAB),
                enumerate_law(exact, prompt, config),
            )
            for index, prompt in enumerate(prompts)
        ],
        record,
    )


RULES: tuple[AcceptanceRule, ...] = ("block", "token", "shared_seed")
TRIOS: list[tuple[str, float, float, dict[str, Any]]] = [
    ("llama", 1.0, 1.0, {"draft_tokens": 2}),
    ("llama", 1.0, 1.3, {"draft_tokens": "auto", "cost_ratio": 0.3}),
    ("gpt2", 0.7, 1.2, {"draft_tokens": 2}),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "alpha", "beta", "drafting"), TRIOS)
def test_joint_law(
    family: str,
    alpha: float,
    beta: float,
    drafting: dict[str, Any],
    rule: AcceptanceRule,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    # What is new here are the models: every rule meets those whose rounds are bound to them.
    is_bound = each_backend == "numba" and family == "llama"
    is_its_turn = RULES.index(rule) == TRIOS.index((family, alpha, beta, drafting))
    if not (is_bound or is_its_turn or request.config.getoption("--every-law")):
        pytest.skip("a rule a trio, as table models meet all of them, or all with --every-law")
    models = placed_trio(family)
    compare_joint_law(models, models, EFTConfig(alpha, beta, acceptance=rule, **drafting), record_chi_square)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_joint_law_of_compiled_models_of_16_bits(
    rule: AcceptanceRule, dtype: torch.dtype, record_chi_square: Record
) -> None:
    skip_unless_compiled(dtype)
    models, exact = placed_trio("llama", dtype), placed_trio("llama", dtype)
    for model in (exact.large_base, *exact.small_tuned, exact.small_base):
        model.float()
    config = EFTConfig(beta=1.2, acceptance=rule, draft_tokens=3)
    compare_joint_law(models, exact, config, record_chi_square)
