"""Pure tensor operations of a round and of the models' layers: torch references and compiled kernels."""

if __name__ == "kernels":
    # Python was started in the root of a checkout, and the Hub's package of this name is asked for.
    from .namesake import stand_aside

    stand_aside()
else:
    from .attention import HEAD_DIMS, LARGEST_HEAD_DIM, MOST_ROWS, append, attention
    from .backend import backend, warm_up
    from .commit import DraftLengthRule, RoundState, commit, committed_tokens
    from .draft import DraftLoop, draft_step
    from .early_stop import EarlyStop, end_drafts, learn, new_early_stop
    from .filters import Sampling, batch_sampling, usable_temperature, warp
    from .layers import GATES, Gate, RMSNorm, normalised, projections
    from .memory import DraftMemory, new_draft_memory, recall, remember
    from .mix import Coefficients, draft_logits, log_probabilities, target_logits
    from .noise import NoiseKey, Stream, derive_seeds, exponential_noise, gumbel_noise, uniform_noise
    from .quantised import QuantisedWeight, Weight, product, quantise, quantised
    from .rotated_attention import rotated_attention
    from .side_by_side import side_by_side
    from .verify import AcceptanceRule, Verdict, verify

__all__ = [
    "GATES",
    "HEAD_DIMS",
    "LARGEST_HEAD_DIM",
    "MOST_ROWS",
    "AcceptanceRule",
    "Coefficients",
    "DraftLengthRule",
    "DraftLoop",
    "DraftMemory",
    "EarlyStop",
    "Gate",
    "NoiseKey",
    "QuantisedWeight",
    "RMSNorm",
    "RoundState",
    "Sampling",
    "Stream",
    "Verdict",
    "Weight",
    "append",
    "attention",
    "backend",
    "batch_sampling",
    "commit",
    "committed_tokens",
    "derive_seeds",
    "draft_logits",
    "draft_step",
    "end_drafts",
    "exponential_noise",
    "gumbel_noise",
    "learn",
    "log_probabilities",
    "new_draft_memory",
    "new_early_stop",
    "normalised",
    "product",
    "projections",
    "quantise",
    "quantised",
    "recall",
    "remember",
    "rotated_attention",
    "side_by_side",
    "target_logits",
    "uniform_noise",
    "usable_temperature",
    "verify",
    "warm_up",
    "warp",
]
