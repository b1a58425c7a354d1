"""Times decoding attention: `python -P -m speculative_eft.bench.kernels.attention --json FILE`.

Against torch's scaled_dot_product_attention with a mask, which is made beforehand, and flash-attn's
`flash_attn_with_kvcache` where it is installed. The cache is cold: between the attention of two tokens in one
layer lie the weights and the keys of all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from speculative_eft.kernels import append, attention
from speculative_eft.models.attention import attend, attend_ragged, ragged_bias, visible_lengths

from ..script import DTYPE, Script, run

__all__ = ["Heads", "measure"]


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int


MODELS = (Heads("Llama-3.1-8B", 32, 8, 128), Heads("Qwen2.5-1.5B", 12, 2, 128))
_TINY = (Heads("tiny", 4, 2, 16),)


def measure(script: Script) -> None:
    """Time the attention of a few new rows a sequence over a long cache."""
    models, batches, contexts, counts = _sizes(script)
    if find_spec("flash_attn") is None:
        script.note("flash-attn is not installed: it is not compared with.")
    for model in models:
        for batch in batches:
            for context in contexts:
                _compare(script, model, batch, context, counts)


def _sizes(script: Script) -> tuple[tuple[Heads, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Models, batches, contexts and new rows of the sweep."""
    if not script.on_gpu:
        return _TINY, (2,), (40,), (1, 5)
    if script.quick:
        return MODELS, (1, 64), (1024, 8192), (1, 5, 9)
    return MODELS, (1, 4, 16, 64), (1024, 4096, 8192, 32_768), (1, 5, 9)


def _compare(script: Script, model: Heads, batch: int, context: int, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    device, most = script.device, max(counts)
    try:
        shape = (batch, model.kv_heads, context + most, model.dim)
        keys, values = (torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2))
    except torch.OutOfMemoryError:
        script.note(f"{model.name}, batch {batch}, context {context} does not fit the memory.")
        return
    lengths = torch.full((batch,), context, device=device)
    for count in counts:
        query = torch.randn(batch, count, model.heads, model.dim, dtype=DTYPE, device=device)
        new = torch.randn(batch, count, model.kv_heads, model.dim, dtype=DTYPE, device=device)
        _measure_one(script, model, context, query, new, keys, values, lengths)


def _measure_one(
    script: Script,
    model: Heads,
    context: int,
    query: Tensor,
    new: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
) -> None:
    batch, count = query.shape[:2]
    span, out = context + count, torch.empty_like(query)
    keys, values = keys[:, :, :span], values[:, :, :span]
    position = lengths[:, None] + torch.arange(count, device=query.device)
    shared = model.heads // model.kv_heads
    bias = ragged_bias(position.repeat(1, shared), torch.arange(span, device=query.device), None, DTYPE)
    seen = visible_lengths("flash_attn", lengths, count, span)
    # What has to be read: keys and values.
    moved = 2 * batch * span * model.kv_heads * model.dim * DTYPE.itemsize
    operations: dict[str, Callable[[], object]] = {
        script.ours: lambda: attention(query, keys, values, lengths, out=out),
        "torch sdpa": lambda: attend(query.transpose(1, 2), keys, values, bias),
    }
    if script.on_gpu and find_spec("flash_attn") is not None:
        operations["flash_attn"] = lambda: attend_ragged("flash_attn", query, keys, values, seen)
    labels = {"model": model.name, "batch": batch, "context": context, "new": count}
    medians = {}
    for name, operation in operations.items():
        medians[name] = median = script.measure(name, operation, labels, cold=True, bytes_moved=moved)
        if median is not None:
            script.content["rows"][-1]["gigabytes_per_second"] = round(moved / median / 1e3, 1)
            script.write()
    written = 2 * 2 * new.numel() * DTYPE.itemsize
    script.measure(
        script.ours,
        lambda: append(new, new, keys, values, lengths),
        {"operation": "append", **labels},
        cold=True,
        bytes_moved=written,
    )
    if script.on_gpu and context == 8192 and batch in (1, 64):
        _add_bar(script, medians, labels, moved)


def _add_bar(script: Script, medians: dict[str, float | None], labels: dict[str, object], moved: int) -> None:
    where = ", ".join(f"{name} {value}" for name, value in labels.items())
    ours, theirs = medians[script.ours], medians.get("flash_attn")
    if theirs is not None:
        ratio = None if ours is None else ours / theirs
        script.bar(f"at most 1.15 times flash_attn's time: {where}", ratio, (ratio or 2) <= 1.15)
    else:
        share = None if ours is None else moved / (ours / 1e6) / script.bandwidth
        script.bar(f"at least 0.8 of copy bandwidth: {where}", share, (share or 0) >= 0.8)


def main() -> None:
    """See `measure`."""
    run("attention", measure)


if __name__ == "__main__":
    main()
