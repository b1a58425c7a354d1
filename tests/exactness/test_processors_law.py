"""Processors that depend on the prefix: the sampled joint law equals enumeration of what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder, general
from speculative_eft.decoding.processors import process_rows
from speculative_eft.kernels import AcceptanceRule

from ..conftest import is_spared
from ..table_models import Tables, random_tables
from .laws import chi_square, joint_law_of_paths, log_softmax
from .sampling import PROMPTS, Record, assert_exact, count_windows, ragged_batch, table_runners

VOCAB = 4
LENGTH = 5
COPIES = 2_500
PENALTY = 1.8

Process = Callable[[np.ndarray, "list[int]"], np.ndarray]


def penalised(logits: np.ndarray, seen: list[int]) -> np.ndarray:
    """Tokens seen before lose: positive logits are divided, negative ones multiplied."""
    changed = logits.copy()
    for token in set(seen):
        changed[token] = logits[token] / PENALTY if logits[token] > 0 else logits[token] * PENALTY
    return changed


def without_repeated_pairs(logits: np.ndarray, seen: list[int]) -> np.ndarray:
    changed = logits.copy()
    pairs = set(itertools.pairwise(seen))
    for token in range(VOCAB):
        if seen and (seen[-1], token) in pairs:
            changed[token] = -np.inf
    return changed


def without_bad_words(logits: np.ndarray, seen: list[int]) -> np.ndarray:
    """Never 2, never 1 after 3, never 0 after 1 1."""
    changed = logits.copy()
    changed[2] = -np.inf
    if seen[-1:] == [3]:
        changed[1] = -np.inf
    if seen[-2:] == [1, 1]:
        changed[0] = -np.inf
    return changed


def padding_is_penalised() -> bool:
    """Whether transformers is one of the older ones, whose penalty takes padding for tokens of the prompt."""
    try:
        RepetitionPenaltyLogitsProcessor(PENALTY, prompt_ignore_length=torch.tensor([1]))  # type: ignore[arg-type]
    except ValueError:
        return True
    return False


# The padding on the left is part of what n-grams and words see, as in transformers.
CASES: dict[str, tuple[Process, dict[str, Any], bool]] = {
    "repetition_penalty": (penalised, {"repetition_penalty": PENALTY}, padding_is_penalised()),
    "no_repeat_ngram": (without_repeated_pairs, {"no_repeat_ngram_size": 2}, True),
    "bad_words": (without_bad_words, {"bad_words_ids": [[2], [3, 1], [1, 1, 0]]}, True),
}


def enumerated(
    tables: Tables, process: Process, prompt: list[int], seen: list[int], temperature: float
) -> Any:
    """Probabilities of all continuations of LENGTH tokens, in lexicographic order."""

    def law(path: tuple[int, ...]) -> np.ndarray:
        before, last = [0, *prompt, *path][-2:]
        mixed = tables.large[before, last] + tables.tuned[0][before, last] - tables.base[before, last]
        processed = process(mixed, [*seen, *path])
        if np.isneginf(processed).all():
            return np.eye(VOCAB)[0]
        return np.exp(log_softmax(processed / temperature))

    return joint_law_of_paths(law, VOCAB, LENGTH)


@pytest.mark.parametrize("rule", ["block", "token", "shared_seed", "naive"])
@pytest.mark.parametrize("case", CASES)
def test_joint_law(
    case: str,
    rule: AcceptanceRule,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    if is_spared(each_backend, request) and (case, rule) != ("bad_words", "block"):
        pytest.skip("Triton's interpreter is slow: one case, or all with --every-law")
    process, options, sees_padding = CASES[case]
    temperature = 1.0 if rule == "block" else 1.4
    tables = random_tables(21, VOCAB)
    ids, mask = ragged_batch(COPIES)
    if rule == "naive":
        decoder: EFTDecoder = NaiveEFTDecoder(table_runners(tables))
    else:
        decoder = EFTDecoder(table_runners(tables), EFTConfig(acceptance=rule, draft_tokens=2))
    output = decoder.generate(
        ids, mask, seed=8, do_sample=True, top_k=0, max_new_tokens=LENGTH, temperature=temperature, **options
    )
    assert isinstance(output, torch.Tensor)
    width = ids.shape[1]
    tokens = output[:, width:].cpu().numpy()
    results = []
    for index, prompt in enumerate(PROMPTS):
        seen = [0] * (width - len(prompt)) + prompt if sees_padding else prompt
        wanted = enumerated(tables, process, prompt, seen, temperature)
        counts = count_windows(tokens[index * COPIES : (index + 1) * COPIES], VOCAB)
        results.append(chi_square(counts, wanted))
    assert_exact(results, record_chi_square)


@pytest.mark.parametrize("case", CASES)
def test_processors_that_do_not_see_the_draft_are_found_out(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that is easily made: every row of a draft processed with the round's first prefix."""

    def blind(
        processors: Any, history: Any, starts: list[int], counts: list[int], scores: torch.Tensor
    ) -> torch.Tensor:
        if scores.shape[1] == 1:
            return process_rows(processors, history, starts, counts, scores)
        rows = [
            process_rows(processors, history, starts, [1] * len(counts), row) for row in scores.split(1, 1)
        ]
        return torch.cat(rows, dim=1)

    process, options, sees_padding = CASES[case]
    tables = random_tables(21, VOCAB)
    prompt, padding = PROMPTS[1], [0] * 4
    copies = 4 * COPIES
    ids = torch.tensor([padding + prompt]).repeat(copies, 1)
    mask = torch.tensor([[*padding, 1]]).repeat(copies, 1)
    monkeypatch.setattr(general, "process_rows", blind)
    output = EFTDecoder(table_runners(tables), EFTConfig(draft_tokens=4)).generate(
        ids, mask, seed=8, do_sample=True, top_k=0, max_new_tokens=LENGTH, **options
    )
    assert isinstance(output, torch.Tensor)
    counts = count_windows(output[:, ids.shape[1] :].cpu().numpy(), VOCAB)
    seen = padding + prompt if sees_padding else prompt
    assert not chi_square(counts, enumerated(tables, process, prompt, seen, 1.0)).accepts
