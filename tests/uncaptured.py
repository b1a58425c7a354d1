"""What stands for CUDA graphs on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from speculative_eft.decoding.running import CapturedBatch
from speculative_eft.models import CapturedFunctions


class Uncaptured(CapturedFunctions):
    """Runs functions as they are, and keeps the keys."""

    def run(self, key: Any, *functions: Any) -> Any:
        self._graphs[key] = None
        result: tuple[Any, ...] = ()
        for function in functions:
            result = (function(*result),)
        return result[0]

    @property
    def keys(self) -> list[Any]:
        """Of the rounds so far, without the kind of call they were of."""
        return [key for _, key in self._graphs]


def as_with_graphs(decoder: Any) -> Uncaptured:
    """Have `decoder` run as on a GPU: one round ahead of the host, in rounds that graphs could replay."""
    graphs = Uncaptured(torch.device("cpu"), 1)
    decoder.lagging, decoder.captured = True, CapturedBatch(graphs)
    return graphs
