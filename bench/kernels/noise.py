"""Times Philox noise: `python -P -m speculative_eft.bench.kernels.noise --json FILE`.

Nothing is read. Where verification and drafting use noise they compute it in registers instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculative_eft.kernels import NoiseKey, Stream, exponential_noise

from ..script import Script, noise_key, run
from ..timing import reference_kernels

__all__ = ["measure"]


def measure(script: Script) -> None:
    """Time exponential draws of one row a sequence against the torch reference."""
    batches, vocabularies = script.sizes()
    for vocab_size in vocabularies:
        for batch in batches:
            noise = noise_key(batch, script.device)
            row = torch.ones(1, dtype=torch.int64, device=script.device)

            def draw(vocab_size: int = vocab_size, noise: NoiseKey = noise, row: Tensor = row) -> object:
                return exponential_noise(noise.seeds, noise.rounds[:, None], row, Stream.DRAFT, vocab_size)

            labels = {"batch": batch, "vocabulary": vocab_size}
            moved = 4 * batch * vocab_size
            script.measure(script.ours, draw, labels, cold=False, bytes_moved=moved)
            with reference_kernels():
                script.measure("torch reference", draw, labels, cold=False)


def main() -> None:
    """See `measure`."""
    run("noise", measure)


if __name__ == "__main__":
    main()
