"""Times top-k, top-p and min-p: `python -P -m speculative_eft.bench.kernels.filters --json FILE`.

What is timed is what filters add to a verification: the cuts of the target's and the draft's laws of every
row. The cache is cold, as for the verification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from speculative_eft.kernels import Sampling, draft_logits, target_logits, warp

from ..script import Script, coefficients, filtered, random_logits, run

__all__ = ["measure"]

_MODELS, _DRAFTED = 3, 8


def _operations(
    batch: int, drafted: int, vocab_size: int, sampling: Sampling, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """The torch reference, and on a GPU the kernels."""
    torch.manual_seed(0)
    large, tuned, base = random_logits(_MODELS, (batch, drafted + 1, vocab_size), device)
    weights = coefficients(batch, device)
    lens = torch.full((batch,), drafted, device=device)

    def reference() -> None:
        warp(target_logits(large, [tuned], base, weights, vocab_size), sampling)
        warp(draft_logits([tuned[:, :drafted]], None, weights, vocab_size), sampling)

    if device.type != "cuda":
        return reference, None
    from speculative_eft.kernels.gpu.filters import law_records
    from speculative_eft.kernels.gpu.tile import pack

    models = pack([large, tuned, base], weights.target_weights, weights.draft_weights)
    return reference, lambda: law_records(models, lens, sampling, sampling, drafted, vocab_size, False)


def measure(script: Script) -> None:
    """Time the cuts of top-k, top-p and min-p against the torch reference, which sorts."""
    script.note(
        f"{_DRAFTED} drafted tokens. The reference returns log-probabilities of the whole vocabulary, the "
        "kernels a record of eight numbers a row, which is what verification reads."
    )
    batches, vocabularies = script.sizes()
    drafted = _DRAFTED if script.on_gpu else 2
    every = ("top_k", "top_p", "min_p")
    for vocab_size in vocabularies:
        for batch in batches:
            for names in (*((name,) for name in every), every):
                labels = {"filters": ", ".join(names), "batch": batch, "vocabulary": vocab_size}
                sampling = filtered(batch, vocab_size, script.device, *names)
                try:
                    reference, kernels = _operations(batch, drafted, vocab_size, sampling, script.device)
                except torch.OutOfMemoryError:
                    script.note(f"Batch {batch}, vocabulary {vocab_size} does not fit the memory.")
                    continue
                # Two reads of each row: one to bound the cuts, one to find them.
                moved = 2 * batch * vocab_size * ((drafted + 1) * _MODELS + drafted) * 2
                if kernels is not None:
                    script.measure("triton", kernels, labels, cold=True, bytes_moved=moved)
                script.measure("torch reference", reference, labels, cold=True)


def main() -> None:
    """See `measure`."""
    run("filters", measure)


if __name__ == "__main__":
    main()
