"""Times the draft's memory: `python -P -m speculative_eft.bench.kernels.memory --json FILE`.

The cache is cold: what is remembered was written a round ago, and the large model's weights are read between.
"""

from __future__ import annotations

import torch

from speculative_eft.kernels import new_draft_memory, recall, remember

from ..script import Script, random_logits, run
from ..timing import reference_kernels

__all__ = ["measure"]


def measure(script: Script) -> None:
    """Time recalling and remembering log-ratios against the torch reference."""
    script.note("Every drafted token was accepted, so that all rows are kept: the most there is to do.")
    batches, vocabularies = script.sizes()
    drafted = 8 if script.on_gpu else 2
    for vocab_size in vocabularies:
        for batch in batches:
            _compare(script, batch, drafted, vocab_size)


def _compare(script: Script, batch: int, drafted: int, vocab_size: int) -> None:
    torch.manual_seed(0)
    device, rows, slots = script.device, drafted + 1, 64
    labels = {"batch": batch, "drafted": drafted, "slots": slots, "vocabulary": vocab_size}
    try:
        memory = new_draft_memory(batch, slots, vocab_size, device)
        large, base = random_logits(2, (batch, rows, vocab_size), device)
    except torch.OutOfMemoryError:
        script.note(f"Batch {batch}, vocabulary {vocab_size} does not fit the memory.")
        return
    block = torch.arange(rows, device=device).expand(batch, -1).contiguous()
    accepted = torch.full((batch,), drafted, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    beta = torch.ones(batch, device=device)
    token = torch.ones(batch, dtype=torch.int64, device=device)

    def keep() -> None:
        remember(memory, large, base, block, accepted, done)

    def look_up() -> object:
        return recall(memory, token, token, beta)

    keep()
    whole = batch * vocab_size
    operations = {
        # Two reads of two models' rows, the ratios written, the mean read and written.
        "remember": (keep, whole * (2 * 2 * 2 * rows + 4 * rows + 8)),
        # The mean and the last ratio read, the correction written.
        "recall": (look_up, whole * 12),
    }
    for name, (operation, moved) in operations.items():
        row = {"operation": name, **labels}
        script.measure(script.ours, operation, row, cold=True, bytes_moved=moved)
        with reference_kernels():
            script.measure("torch reference", operation, row, cold=True)


def main() -> None:
    """See `measure`."""
    run("memory", measure)


if __name__ == "__main__":
    main()
