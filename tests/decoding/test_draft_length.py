"""Adaptive draft lengths: what is drafted at which costs and acceptance, alone and in a batch."""

from __future__ import annotations

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.decoding.draft_length import DraftLengthPolicy, _least_chances

from ..tiny_models import ragged_prompts, tiny_trio


def draft_len(
    policy: DraftLengthPolicy, accepted: float = 0.0, tested: float = 0.0, greedy: bool = False
) -> int:
    prior = policy.prior_accepted(ends_early=False, greedy=greedy)
    counts = (torch.tensor([count]) for count in (accepted, tested, prior))
    return int(policy.rule(torch.device("cpu")).draft_lens(*counts))


def test_costly_drafts_are_not_made() -> None:
    lens = [draft_len(DraftLengthPolicy(*costs)) for costs in ((0.05, 0.0), (0.3, 0.0), (0.3, 1.5))]
    assert lens[0] > lens[1] > lens[2] == 0


def test_the_chance_from_which_a_token_is_worth_its_cost() -> None:
    # Where one in a hundred is accepted, plain steps of 1.5 are best, and one more token takes .75.
    assert float(_least_chances(DraftLengthPolicy(0.25, 0.5))[0]) == pytest.approx(0.75 / 1.5 / 0.01)


def test_in_a_batch_a_draft_has_to_promise_more() -> None:
    # By the prior 1.75 tokens in 1.72 times the time: worth it alone, not where all wait for the slowest.
    costs = (0.25, 0.83)
    assert draft_len(DraftLengthPolicy(*costs)) == 1
    assert draft_len(DraftLengthPolicy(*costs, is_batched=True)) == 0
    # So has every further token, whatever the draft.
    costs = (0.1, 0.1)
    assert draft_len(DraftLengthPolicy(*costs)) > draft_len(DraftLengthPolicy(*costs, is_batched=True)) > 1


def test_rows_of_sequences_that_have_ended_do_not_wait() -> None:
    # A draft of one token takes 1.7 plain steps, mostly of what all share or of rows, which are spared.
    for costs, batched in (((1.0, 1.1), 0), ((0.1, 0.74), 1)):
        assert draft_len(DraftLengthPolicy(*costs)) == 1
        assert draft_len(DraftLengthPolicy(*costs, is_batched=True)) == batched


def test_in_a_batch_sequences_draft_more_alike() -> None:
    costs = (0.05, 0.0)
    first = draft_len(DraftLengthPolicy(*costs))
    for accepted in (20.0, 80.0):
        alone = draft_len(DraftLengthPolicy(*costs), accepted, 80.0)
        batched = draft_len(DraftLengthPolicy(*costs, is_batched=True), accepted, 80.0)
        assert abs(alone - first) > abs(batched - first) > 0


def test_in_a_batch_one_that_drafts_goes_on_for_less() -> None:
    # It waits for the others already. By itself a draft pays from .647 on, and to begin with from .702 on.
    policy = DraftLengthPolicy(0.25, 0.72, is_batched=True)
    assert draft_len(policy) == draft_len(policy, accepted=40.0, tested=100.0) == 1
    # In the end what is hardly ever accepted is not drafted.
    assert draft_len(policy, accepted=30.0, tested=300.0) == 0


def test_greedy_sequences_begin_with_longer_drafts() -> None:
    for is_batched in (False, True):
        policy = DraftLengthPolicy(0.1, 0.1, is_batched)
        assert draft_len(policy, greedy=True) > draft_len(policy)
    costly = DraftLengthPolicy(0.25, 0.83, is_batched=True)
    assert draft_len(costly, greedy=True) > draft_len(costly) == 0


@pytest.mark.parametrize("expected_batch", [1, 2])
def test_where_drafts_never_pay_nothing_is_kept_for_them(expected_batch: int) -> None:
    models = tiny_trio("llama")
    costly = EFTConfig(
        cost_ratio=0.3,
        row_cost=1.5,
        expected_batch=expected_batch,
        acceptance="shared_seed",
        draft_weights="own",
    )
    decoder, naive = EFTDecoder(models, costly), NaiveEFTDecoder(models)
    assert decoder.longest_draft == 0
    assert decoder.bytes_beside_caches == naive.bytes_beside_caches
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "seed": 3}
    assert (
        decoder.generate(**ragged_prompts(2), **options) == naive.generate(**ragged_prompts(2), **options)
    ).all()
