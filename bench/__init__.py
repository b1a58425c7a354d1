"""Measurements: plain baselines, and comparisons of decoders in interleaved pairs."""
