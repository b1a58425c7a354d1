"""Exact speculative sampling from emulated fine-tuned language models: p proportional to L (F / B)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding import EFTConfig as EFTConfig
    from .decoding import EFTDecoder as EFTDecoder
    from .decoding import EFTOutput as EFTOutput
    from .decoding import EFTStats as EFTStats
    from .decoding import EFTTrace as EFTTrace
    from .decoding import NaiveEFTDecoder as NaiveEFTDecoder
    from .decoding import SlotBatch as SlotBatch
    from .decoding import SlotOptions as SlotOptions
    from .decoding import SlotProgress as SlotProgress
    from .models import EFTModels as EFTModels
    from .models import IncompatibleModelsError as IncompatibleModelsError

__version__ = "0.1.0"

# A wheel has the sub-packages in this folder, a checkout beside it (package-dir in pyproject.toml). Python
# that is started in a checkout's root finds this folder there, whatever is installed.
_folder = Path(__file__).parent
if not (_folder / "decoding").is_dir():
    __path__.append(str(_folder.parent))

# Resolved on first use: the command line answers --help and bad options without loading torch.
_HOMES = {
    "EFTConfig": "decoding",
    "EFTDecoder": "decoding",
    "EFTModels": "models",
    "EFTOutput": "decoding",
    "EFTStats": "decoding",
    "EFTTrace": "decoding",
    "IncompatibleModelsError": "models",
    "NaiveEFTDecoder": "decoding",
    "SlotBatch": "decoding",
    "SlotOptions": "decoding",
    "SlotProgress": "decoding",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
