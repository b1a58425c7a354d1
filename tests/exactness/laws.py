"""The target's law by exact enumeration in float64, written apart from the code under test."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.table_models import Tables


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@dataclass(frozen=True)
class Law:
    """Parameters of the target."""

    alpha: tuple[float, ...] = (1.0,)
    beta: float = 1.0
    conservative_top_p: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def _kept_by_top_p(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest most probable tokens with a mass of at least top_p."""
    order = np.argsort(-probabilities, kind="stable")
    mass_before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(probabilities), dtype=bool)
    kept[order[mass_before < top_p]] = True
    return kept


def next_token_law(tables: Tables, law: Law, before: int, last: int) -> np.ndarray:
    """Probabilities of the next token after two given tokens."""
    log_large = log_softmax(tables.large[before, last])
    log_base = log_softmax(tables.base[before, last])
    small = log_base.copy()
    for alpha, table in zip(law.alpha, tables.tuned, strict=True):
        small += alpha * (log_softmax(table[before, last]) - log_base)
    small = log_softmax(small)
    delta = law.beta * (log_large - log_base)
    if law.conservative_top_p is not None:
        delta = np.where(_kept_by_top_p(np.exp(small), law.conservative_top_p), delta, 0.0)
    probabilities = np.exp(log_softmax(log_softmax(small + delta) / law.temperature))
    if law.top_k:
        probabilities[np.argsort(-probabilities, kind="stable")[law.top_k :]] = 0
        probabilities /= probabilities.sum()
    if law.top_p < 1:
        probabilities[~_kept_by_top_p(probabilities, law.top_p)] = 0
        probabilities /= probabilities.sum()
    if law.min_p > 0:
        probabilities[probabilities < law.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


def joint_law(tables: Tables, law: Law, prompt: list[int], start: int, length: int) -> np.ndarray:
    """Probabilities of generated tokens start..start+length-1 together, in lexicographic order.

    The tables look two tokens back, so the sum over everything earlier runs over pairs of tokens.
    """
    vocab_size = tables.base.shape[-1]
    step = np.stack(
        [
            [next_token_law(tables, law, before, last) for last in range(vocab_size)]
            for before in range(vocab_size)
        ]
    )
    before, last = [0, *prompt][-2:]
    pairs = np.zeros((vocab_size, vocab_size))
    pairs[before, last] = 1.0
    for _ in range(start):
        pairs = np.einsum("bl,blt->lt", pairs, step)
    joint = pairs
    for _ in range(length):
        joint = np.einsum("...bl,blt->...blt", joint, step)
    return joint.sum(axis=(0, 1)).reshape(-1)


def joint_law_of_paths(
    step: Callable[[tuple[int, ...]], np.ndarray], vocab_size: int, length: int
) -> np.ndarray:
    """Probabilities of all continuations of `length` tokens, in lexicographic order.

    `step` gives the next token's law after what was generated, of which it may look at all.
    """
    joint = {(): 1.0}
    for _ in range(length):
        joint = {
            (*path, token): chance * law[token]
            for path, chance in joint.items()
            for law in [step(path)]
            for token in range(vocab_size)
        }
    return np.array([joint[path] for path in itertools.product(range(vocab_size), repeat=length)])


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's statistic, its degrees of freedom, and the threshold of the suite."""

    statistic: float
    degrees: int

    @property
    def threshold(self) -> float:
        """df + 10 sqrt(2 df): false alarms below 1e-9."""
        return float(self.degrees + 10 * np.sqrt(2 * self.degrees))

    @property
    def accepts(self) -> bool:
        return self.statistic <= self.threshold


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> ChiSquare:
    """Compare counts with a law, merging outcomes expected fewer than 5 times into one bin.

    An outcome of probability 0 that occurred makes the statistic infinite.
    """
    expected = probabilities * counts.sum()
    rare = expected < 5
    if counts[probabilities == 0].sum() > 0:
        return ChiSquare(np.inf, int((~rare).sum()))
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        # Too little for a bin of its own: give it to the smallest of the others.
        smallest = int(np.argmin(expected[:-1]))
        observed[smallest] += observed[-1]
        expected[smallest] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    return ChiSquare(float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1)
