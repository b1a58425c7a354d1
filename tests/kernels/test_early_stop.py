"""Drafts that end early: the compiled functions against their reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speculative_eft.kernels import end_drafts, learn, new_early_stop

from ..device import test_device


def test_early_stop() -> None:
    """Of Numba's functions, which rounds call from inside others."""
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if test_device().type != "cpu":
        pytest.skip("Numba's kernels are a CPU's")
    from speculative_eft.kernels.cpu.early_stop import early_stop_arrays, ends_draft, learn_rows

    @numba.njit
    def ends(arrays: Any, step: int, chances: Any, counts: Any) -> None:
        for sequence in range(counts.shape[0]):
            if step + 1 < counts[sequence] and ends_draft(arrays, sequence, step, chances[sequence]):
                counts[sequence] = step + 2

    @numba.njit
    def learned(arrays: Any, counts: Any, accepted_lens: Any) -> None:
        learn_rows(arrays, counts, accepted_lens)

    batch, longest = 40, 6
    generator = torch.Generator().manual_seed(4)
    least_chances = torch.linspace(1, 0.1, 64)
    reference, compiled = (new_early_stop(batch, longest, least_chances, 0.9, 3.0, 4.0) for _ in range(2))
    lens_seen = set()
    for _ in range(6):
        asked = torch.randint(0, longest + 1, (batch,), generator=generator)
        done = torch.rand(batch, generator=generator) < 0.2
        draft_lens, counts = asked.clone(), torch.where(done, 0, asked + 1)
        arrays = early_stop_arrays(compiled)
        for step in range(longest):
            chance = torch.rand(batch, generator=generator) ** 0.3
            end_drafts(reference, draft_lens, step, chance)
            ends(arrays, step, chance.numpy(), counts.numpy())
        assert torch.equal(counts[~done] - 1, draft_lens[~done])
        lens_seen |= set(draft_lens.tolist())
        accepted_lens = (torch.rand(batch, generator=generator) * (draft_lens + 1)).long()
        learn(reference, draft_lens, accepted_lens, done)
        learned(arrays, counts.numpy(), accepted_lens.numpy())
        for name in ("accepted", "tested", "least"):
            torch.testing.assert_close(getattr(compiled, name), getattr(reference, name))
    assert lens_seen == set(range(longest + 1))
