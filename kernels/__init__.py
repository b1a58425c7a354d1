"""Pure tensor operations: the mix, its filters, the noise, and the verification of drafts."""

from .commit import committed_tokens
from .draft import draft_step
from .filters import Sampling, warp
from .mix import Coefficients, draft_logits, target_logits
from .noise import Stream, derive_seeds, exponential_noise, gumbel_noise, uniform_noise
from .verify import AcceptanceRule, NoiseKey, Verdict, verify

__all__ = [
    "AcceptanceRule",
    "Coefficients",
    "NoiseKey",
    "Sampling",
    "Stream",
    "Verdict",
    "committed_tokens",
    "derive_seeds",
    "draft_logits",
    "draft_step",
    "exponential_noise",
    "gumbel_noise",
    "target_logits",
    "uniform_noise",
    "verify",
    "warp",
]
