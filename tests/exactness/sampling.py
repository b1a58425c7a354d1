"""Sampling from a decoder over table models, and comparing the samples with a law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.models import EFTRunners

from ..table_models import TableDrafter, TableRunner, Tables
from .laws import ChiSquare, Law, chi_square, joint_law

# Prompts of different lengths share each batch, padded on the left.
PROMPTS = ([1, 2], [3], [0, 3, 1, 1, 2])
WINDOW = 4


def table_runners(tables: Tables) -> EFTRunners:
    return EFTRunners(
        large=TableRunner(tables.large),
        tuned=[TableRunner(table) for table in tables.tuned],
        base=TableRunner(tables.base),
    )


def with_drafters(sampler: EFTDecoder) -> EFTRunners:
    """A decoder's table models with others that draft in their place."""
    runners = sampler.runners
    drafting = runners.small if sampler._drafts_as_pair() else runners.tuned
    places = [cast(TableRunner, runner) for runner in drafting]
    return replace(runners, drafters=[TableDrafter(place, seed) for seed, place in enumerate(places)])


def ragged_batch(copies: int, prompts: Sequence[list[int]] = PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Every prompt `copies` times: ids and attention mask [len(prompts) * copies, longest]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)


def law_of(config: EFTConfig, options: dict[str, float], experts: int) -> Law:
    """The law a decoder with this config and these generation options should have."""
    alphas = config.alphas if len(config.alphas) > 1 else config.alphas * experts
    return Law(
        alpha=alphas,
        beta=config.beta,
        conservative_top_p=config.conservative_top_p,
        temperature=options.get("temperature", 1.0),
        top_k=int(options.get("top_k", 0)),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p", 0.0),
    )


def count_windows(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each window of tokens occurred: [vocab_size ** window]."""
    places = vocab_size ** np.arange(tokens.shape[1])[::-1]
    return np.bincount(tokens @ places, minlength=vocab_size ** tokens.shape[1])


def compare_with_law(
    tables: Tables,
    config: EFTConfig,
    options: dict[str, float],
    new_tokens: int,
    copies: int,
    seed: int = 0,
    decoder: type[EFTDecoder] = EFTDecoder,
    lagging: bool = False,
    drafters: bool = False,
    prompts: Sequence[list[int]] = PROMPTS,
) -> list[ChiSquare]:
    """Joint laws of the first and of the last four generated tokens, for each prompt of a ragged batch.

    `drafters` has others draft in the models' place.
    """
    ids, mask = ragged_batch(copies, prompts)
    sampler = decoder(table_runners(tables), config)
    if drafters:
        sampler.runners = with_drafters(sampler)
    # On a GPU they always do.
    sampler.lagging |= lagging
    output = sampler.generate(
        ids,
        mask,
        seed=seed,
        do_sample=True,
        max_new_tokens=new_tokens,
        **{"top_k": 0, **options},
    )
    assert isinstance(output, torch.Tensor)
    tokens = output[:, ids.shape[1] :].cpu().numpy()
    law = law_of(config, options, len(tables.tuned))
    vocab_size = tables.base.shape[-1]
    return [
        chi_square(
            count_windows(tokens[index * copies : (index + 1) * copies, start : start + WINDOW], vocab_size),
            joint_law(tables, law, prompt, start, WINDOW),
        )
        for index, prompt in enumerate(prompts)
        for start in (0, new_tokens - WINDOW)
    ]


Record = Callable[[float, float], None]


def assert_exact(results: list[ChiSquare], record: Record) -> None:
    for result in results:
        assert result.accepts, f"{result.statistic:.0f} on {result.degrees} degrees of freedom"
        record(result.statistic, result.degrees)
