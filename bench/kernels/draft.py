"""Times a draft step: `python -P -m speculative_eft.bench.kernels.draft --json FILE`.

The cache is warm: the small model's head has just written the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from speculative_eft.kernels import Sampling, Stream, draft_step

from ..script import Script, coefficients, filtered, noise_key, random_logits, run
from ..timing import reference_kernels

__all__ = ["measure"]

# The pair has B's logits beside F's; a correction is what is remembered.
_VARIANTS: dict[str, tuple[str, ...]] = {
    "F": (),
    "F, B": ("pair",),
    "F, correction": ("correction",),
    "F, all filters": ("filters",),
    "F, B, correction, all filters": ("pair", "correction", "filters"),
}


def _operation(
    batch: int, vocab_size: int, options: tuple[str, ...], device: torch.device
) -> Callable[[], object]:
    torch.manual_seed(0)
    tuned, base = random_logits(2, (batch, vocab_size), device)
    pair = "pair" in options
    names = ("top_k", "top_p", "min_p") if "filters" in options else ()
    sampling: Sampling = filtered(batch, vocab_size, device, *names)
    weights, noise = coefficients(batch, device, pair=pair), noise_key(batch, device)
    correction = torch.randn(batch, vocab_size, device=device) if "correction" in options else None

    def step() -> None:
        draft_step(
            [tuned], base if pair else None, weights, sampling, noise, Stream.DRAFT, 1, vocab_size,
            correction,
        )  # fmt: skip

    return step


def measure(script: Script) -> None:
    """Time one draft step against the torch reference."""
    batches, vocabularies = script.sizes()
    for vocab_size in vocabularies:
        for batch in batches:
            for name, options in _VARIANTS.items():
                labels = {"law": name, "batch": batch, "vocabulary": vocab_size}
                # Without B its place is taken by F at weight 0, which is not read.
                read = (2 if "pair" in options else 1) * 2 + (4 if "correction" in options else 0)
                moved = batch * vocab_size * read * (3 if "filters" in options else 1)
                step = _operation(batch, vocab_size, options, script.device)
                script.measure(script.ours, step, labels, cold=False, bytes_moved=moved)
                with reference_kernels():
                    script.measure("torch reference", step, labels, cold=False)


def main() -> None:
    """See `measure`."""
    run("draft", measure)


if __name__ == "__main__":
    main()
