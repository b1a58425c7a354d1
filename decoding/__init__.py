"""Decoding: what is sampled from, the rounds that sample it, and what they return."""

from .config import EFTConfig
from .decoder import EFTDecoder, NaiveEFTDecoder, Streamer
from .output import EFTOutput, EFTStats, EFTTrace

__all__ = ["EFTConfig", "EFTDecoder", "EFTOutput", "EFTStats", "EFTTrace", "NaiveEFTDecoder", "Streamer"]
