"""Decoding: what is sampled from, the rounds that sample it, and what they return."""

from .adapter import CUSTOM_GENERATE_FOLDER
from .chat import Chat, plain_chat
from .config import DraftWeights, EFTConfig
from .decoder import EFTDecoder, NaiveEFTDecoder
from .output import EFTOutput, EFTStats, EFTTrace
from .past import EFTPast
from .scoring import TokenScores
from .slots import SlotBatch, SlotOptions, SlotProgress
from .streaming import Streamer, TokenCallback

__all__ = [
    "CUSTOM_GENERATE_FOLDER",
    "Chat",
    "DraftWeights",
    "EFTConfig",
    "EFTDecoder",
    "EFTOutput",
    "EFTPast",
    "EFTStats",
    "EFTTrace",
    "NaiveEFTDecoder",
    "SlotBatch",
    "SlotOptions",
    "SlotProgress",
    "Streamer",
    "TokenCallback",
    "TokenScores",
    "plain_chat",
]
