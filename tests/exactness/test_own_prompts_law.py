"""Tuned models with prompts of their own: the joint law equals enumeration, whether they end alike or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.kernels import AcceptanceRule

from ..conftest import is_spared
from ..table_models import Tables, random_tables
from .laws import chi_square, joint_law_of_paths, log_softmax
from .sampling import PROMPTS, Record, assert_exact, count_windows, ragged_batch, table_runners

VOCAB = 4
LENGTH = 4
COPIES = 6_000
# The first ends as the bases' does, which is [1, 2]; the others do not, and their rounds begin with no draft.
OWN = ([3, 0, 2], [0, 1], [2, 2, 0, 1, 0])


def enumerated(tables: Tables, prompt: list[int], own: list[int]) -> np.ndarray:
    """Probabilities of all continuations of LENGTH tokens, in lexicographic order."""

    def step(path: tuple[int, ...]) -> np.ndarray:
        at, at_own = ((*[0, *tokens, *path][-2:],) for tokens in (prompt, own))
        return np.exp(log_softmax(tables.large[at] + tables.tuned[0][at_own] - tables.base[at]))

    return joint_law_of_paths(step, VOCAB, LENGTH)


@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("rule", ["block", "token"])
def test_joint_law(
    rule: AcceptanceRule,
    lagging: bool,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    if is_spared(each_backend, request):
        pytest.skip("Triton's interpreter is slow: with --every-law")
    tables = random_tables(31, VOCAB)
    ids, mask = ragged_batch(COPIES)
    own_ids, own_mask = ragged_batch(COPIES, OWN)
    decoder = EFTDecoder(table_runners(tables), EFTConfig(acceptance=rule, draft_tokens=3))
    decoder.lagging |= lagging
    output = decoder.generate(
        ids, mask, tuned_input_ids=own_ids, tuned_attention_mask=own_mask, seed=2, do_sample=True, top_k=0,
        max_new_tokens=LENGTH + 2,
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    tokens = output[:, ids.shape[1] : ids.shape[1] + LENGTH].cpu().numpy()
    counts = [count_windows(rows, VOCAB) for rows in np.split(tokens, len(PROMPTS))]
    laws = [enumerated(tables, prompt, own) for prompt, own in zip(PROMPTS, OWN, strict=True)]
    assert_exact([chi_square(*pair) for pair in zip(counts, laws, strict=True)], record_chi_square)
