"""Times models' passes over few rows: `python -P -m speculative_eft.bench.kernels.layers --json FILE`.

The kernels of layers overlap, which none of them shows alone: so all layers and the output head run, products
with what surrounds them and attention in its launch. Against torch's operations one by one. The small models
step by copies of eight bits too; of the large ones there are a few layers.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from speculative_eft.models import ModelRunner

from ..published import SHAPES as PUBLISHED
from ..script import DTYPE, Script, run
from ..shapes import LLAMA, QWEN, TINY, fill_with_noise, random_model, step_bytes

__all__ = ["measure"]


@dataclass(frozen=True)
class Shape:
    """A model's configuration, with as many layers as are to run, and whether it is one that drafts."""

    name: str
    settings: dict[str, Any]
    drafts: bool


_FEW = {"num_hidden_layers": 8}
SHAPES = (
    Shape("Llama-3.2-1B", LLAMA.small, True),
    Shape("Qwen2.5-1.5B", QWEN.small, True),
    Shape("Gemma-3-1B", PUBLISHED["gemma-3-1b"], True),
    Shape("Llama-3.1-8B", LLAMA.large | _FEW, False),
    Shape("Qwen2.5-32B", QWEN.large | _FEW, False),
)
_TINY = (Shape("tiny", TINY.small, True),)
_ROWS = (1, 9)


def measure(script: Script) -> None:
    """Time passes of one and of nine rows a sequence over caches that are full of random numbers."""
    shapes, batches, contexts = _sizes(script)
    for shape in shapes:
        with script.device:
            model = random_model(shape.settings, DTYPE)
        for batch in batches:
            for context in contexts:
                _compare(script, shape, model, batch, context)
        del model
        gc.collect()


def _sizes(script: Script) -> tuple[tuple[Shape, ...], tuple[int, ...], tuple[int, ...]]:
    """Models, batches and contexts of the sweep."""
    if not script.on_gpu:
        return _TINY, (2,), (40,)
    return SHAPES, (1,) if script.quick else (1, 4, 16), (1024, 8192)


@torch.inference_mode()
def _compare(script: Script, shape: Shape, model: PreTrainedModel, batch: int, context: int) -> None:
    ours, reference = ModelRunner(model), ModelRunner(model, attention="sdpa")
    for runner in (ours, reference):
        fill_with_noise(runner, batch, context + max(_ROWS))
        runner.lengths.fill_(context)
    for rows in _ROWS:
        block = torch.zeros(batch, rows, dtype=torch.int64, device=script.device)
        labels = {
            "model": shape.name, "layers": model.config.num_hidden_layers, "batch": batch,
            "context": context, "rows": rows, "weights": "own",
        }  # fmt: skip
        moved = round(step_bytes(model).of(batch * context))
        for name, runner in ((script.ours, ours), ("torch reference", reference)):
            forward = partial(runner.forward, block, context + rows)
            script.measure(name, forward, labels, cold=True, bytes_moved=moved)
        if shape.drafts and rows == 1:
            forward = partial(ours.quantised().forward, block, context + rows)
            moved = round(step_bytes(model, 1).of(batch * context))
            script.measure(script.ours, forward, labels | {"weights": "int8"}, cold=True, bytes_moved=moved)


def main() -> None:
    """See `measure`."""
    run("layers", measure)


if __name__ == "__main__":
    main()
