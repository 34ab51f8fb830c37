"""The matrices of Winograd's minimal filtering.

The points of the polynomials, 0, +-3/4, +-3/2 and infinity, keep rounding errors near those of the direct way
(Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Scheme:
    """How the results of one tile along one dim are made.

    Attributes:
        name: by which compiled kernels know it.
        spread: `[products, inputs of a tile]`.
        taps: `[products, 3]`, for the weights.
        merge: `[results of a tile, products]`.
        step: input cells from tile to tile.
        cells: fewer of them, over all frames, do not pay for transforming the weights by compiled kernels.
    """

    name: str
    spread: Matrix
    taps: Matrix
    merge: Matrix
    step: int
    cells: int

    @property
    def products(self) -> int:
        return len(self.spread)

    @property
    def results(self) -> int:
        return len(self.merge)


def _toom_cook(points: Sequence[float], results: int) -> Scheme:
    """The scheme of `results` results of a filter of 3, by these points and the one at infinity."""
    count = len(points) + 1
    powers = torch.tensor([[point**power for power in range(count)] for point in points], dtype=torch.float64)
    powers = torch.cat([powers, torch.eye(count, dtype=torch.float64)[-1:]])
    infinite = torch.zeros(count, dtype=torch.float64)
    infinite[-1] = 1
    spread = torch.linalg.inv(powers).T
    taps, merge = powers[:, :3].clone(), powers[:, :results].T.clone()
    taps[-1], merge[:, -1] = torch.eye(3, dtype=torch.float64)[-1], torch.eye(results, dtype=torch.float64)[-1]
    largest = spread.abs().amax(1, keepdim=True)  # moved to the weights, so that the inputs keep their magnitude
    spread[spread.abs() < 1e-12] = 0
    return Scheme("plain", _rows(spread / largest), _rows(taps * largest), _rows(merge), results, 1024)


def _rows(matrix: Tensor) -> Matrix:
    return tuple(map(tuple, matrix.tolist()))


PLAIN = _toom_cook((0, 0.75, -0.75, 1.5, -1.5), 4)
# Nearest upsampling by two, then the convolution: of two adjoining cells and their copies only three products differ.
UPSAMPLING = Scheme(
    name="upsampling",
    spread=((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    taps=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    merge=((1, 1, 0), (0, 1, -1)),
    step=1,
    cells=256,
)
SCHEMES = {one.name: one for one in (PLAIN, UPSAMPLING)}
