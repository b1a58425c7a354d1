"""Muon: momentum whose direction is orthogonalised, for the matrices inside a network.

`torch.optim.Muon` does the same one matrix at a time and always in bfloat16; the small matrices of the
demo models take several times longer that way on a CPU than when all of one shape go through together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly, of a (count, rows, columns) batch with rows <= columns.

    Five steps of the quintic Newton-Schulz iteration; singular values end between about 0.7 and 1.2.
    """
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    orthogonal: Tensor = x.to(matrices.dtype)
    return orthogonal


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step of a matrix has entries of RMS lr / sqrt(longer side)
    times max(1, rows / columns) ** 0.5, so one rate suits every shape."""

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    height, width = matrix.shape
                    shapes[height, width].append(matrix)
            for (height, width), members in shapes.items():
                directions = [self._direction(matrix, group["momentum"]) for matrix in members]
                stacked = torch.stack(directions)
                if height > width:
                    stacked = orthogonalised(stacked.mT.contiguous()).mT
                else:
                    stacked = orthogonalised(stacked)
                rate = group["lr"] * max(1.0, height / width) ** 0.5
                for matrix, direction in zip(members, stacked, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        gradient = matrix.grad
        assert gradient is not None
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum"]
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)
