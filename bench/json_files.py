"""JSON files that are there whole or not at all, and hold nothing that JSON has no name for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["without_nan", "write_json"]


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead, in however many containers."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file at once, so that a reader or a broken run never meets half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(without_nan(content), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
