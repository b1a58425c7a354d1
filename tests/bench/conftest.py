"""A trio of tiny random models, and a benchmark of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from speculative_eft.bench.benchmark import Report, new_report, run_benchmark
from speculative_eft.bench.plan import Plan
from speculative_eft.models import EFTModels, StepCosts

OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "top_k": 0, "eos_token_id": []}

PLAN = Plan(
    temperatures=(1.0, 0.0),
    batches=(1, 2),
    contexts=(None, 12),
    lengths=(6, 9),
    alphas=(1.0,),
    betas=(1.0, 1.5),
    conservative_top_ps=(None, 0.9),
    rules=("block", "token"),
    draft_tokens=(1, 2, "auto"),
    repeats=1,
    least_runs=2,
    seed=0,
)


@dataclass(frozen=True)
class TinyTrio:
    models: EFTModels
    prompts: list[list[int]]


def _model(seed: int, hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        # Laws far from uniform, so that a draft is sometimes rejected.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny() -> TinyTrio:
    logging.set_verbosity_error()
    models = EFTModels(_model(0, 32, 2), _model(1, 16, 1), _model(2, 16, 1))
    return TinyTrio(models, [[1, 2, 3], [4, 5], [6, 7, 8, 9]])


@pytest.fixture(scope="session")
def report(tiny: TinyTrio) -> Report:
    """A whole benchmark of the tiny trio."""
    made = new_report(tiny.models, PLAN, "speculative-eft bench --quick", "3 of a test", None)
    with pytest.MonkeyPatch.context() as patch:
        # By the costs of a busy machine it may be best to draft nothing.
        patch.setattr(EFTModels, "step_costs", lambda *arguments, **options: StepCosts(0.25, 0.02))
        run_benchmark(tiny.models, tiny.prompts, made, lambda _: None, lambda: None, lambda: None)
    return made


@pytest.fixture(scope="session")
def simulated(tiny: TinyTrio) -> Report:
    """A short benchmark of the tiny trio with an acceptance of 0.9 forced on it."""
    plan = replace(PLAN, contexts=(None,), betas=(1.0,), conservative_top_ps=(None,), batches=(1, 2))
    plan = replace(plan, lengths=(40,), rules=("block",), draft_tokens=(2, "auto"))
    made = new_report(tiny.models, plan, "speculative-eft bench", "3 of a test", 0.9)
    run_benchmark(tiny.models, tiny.prompts, made, lambda _: None, lambda: None, lambda: None)
    return made
