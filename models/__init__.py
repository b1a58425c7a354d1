"""Running networks: the models of emulated fine-tuning, their runners and caches.

Names are imported when first used, so that `speculative_eft.models.demo` and the checks of
`speculative_eft.models.sources` need neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .costs import StepCosts as StepCosts
    from .describe import ModelDescription as ModelDescription
    from .eft_models import EFTModels as EFTModels
    from .errors import IncompatibleModelsError as IncompatibleModelsError
    from .errors import UnavailableModelsError as UnavailableModelsError
    from .graphs import CapturedFunctions as CapturedFunctions
    from .graphs import captured_functions as captured_functions
    from .inspection import TrioReport as TrioReport
    from .inspection import inspect_trio as inspect_trio
    from .memory import caches_fit as caches_fit
    from .memory import caches_hold as caches_hold
    from .memory import check_caches as check_caches
    from .placement import check_device as check_device
    from .protocol import EFTRunners as EFTRunners
    from .protocol import Runner as Runner
    from .protocol import StepByStep as StepByStep
    from .protocol import bind_passes as bind_passes
    from .protocol import forward_each as forward_each
    from .protocol import steps_together as steps_together
    from .runner import ModelRunner as ModelRunner
    from .slot_cache import SlotCache as SlotCache
    from .sources import find_sources as find_sources

_HOMES = {
    "CapturedFunctions": "graphs",
    "EFTModels": "eft_models",
    "EFTRunners": "protocol",
    "IncompatibleModelsError": "errors",
    "ModelDescription": "describe",
    "ModelRunner": "runner",
    "Runner": "protocol",
    "SlotCache": "slot_cache",
    "StepByStep": "protocol",
    "StepCosts": "costs",
    "TrioReport": "inspection",
    "UnavailableModelsError": "errors",
    "bind_passes": "protocol",
    "caches_fit": "memory",
    "caches_hold": "memory",
    "check_caches": "memory",
    "check_device": "placement",
    "find_sources": "sources",
    "captured_functions": "graphs",
    "inspect_trio": "inspection",
    "forward_each": "protocol",
    "steps_together": "protocol",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
