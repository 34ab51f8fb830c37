"""The matrices of Winograd's minimal filtering.

The interpolation points, 0, +-3/4, +-3/2 and infinity, keep rounding errors close to those of direct convolution
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
    """The transforms that compute the results of one tile along one dim.

    Attributes:
        name: the suffix of the compiled kernels' names.
        input_transform: `[products, inputs of a tile]`.
        filter_transform: `[products, 3]`.
        output_transform: `[results of a tile, products]`.
        step: input cells from tile to tile.
        cells: with fewer cells than this over all frames, transforming the weights by compiled kernels costs more than
            it saves.
    """

    name: str
    input_transform: Matrix
    filter_transform: Matrix
    output_transform: Matrix
    step: int
    cells: int

    @property
    def products(self) -> int:
        return len(self.input_transform)

    @property
    def results(self) -> int:
        return len(self.output_transform)


def _toom_cook(points: Sequence[float], results: int) -> Scheme:
    """Return the scheme for `results` results of a filter of 3, from these points and the one at infinity."""
    count = len(points) + 1
    powers = torch.tensor([[point**power for power in range(count)] for point in points], dtype=torch.float64)
    powers = torch.cat([powers, torch.eye(count, dtype=torch.float64)[-1:]])
    infinite = torch.zeros(count, dtype=torch.float64)
    infinite[-1] = 1
    inputs = torch.linalg.inv(powers).T
    filters, outputs = powers[:, :3].clone(), powers[:, :results].T.clone()
    filters[-1], outputs[:, -1] = torch.eye(3, dtype=torch.float64)[-1], torch.eye(results, dtype=torch.float64)[-1]
    largest = inputs.abs().amax(1, keepdim=True)  # moved into the filter transform: inputs keep their magnitude
    inputs[inputs.abs() < 1e-12] = 0
    return Scheme("plain", _rows(inputs / largest), _rows(filters * largest), _rows(outputs), results, 1024)


def _rows(matrix: Tensor) -> Matrix:
    return tuple(map(tuple, matrix.tolist()))


PLAIN = _toom_cook((0, 0.75, -0.75, 1.5, -1.5), 4)
# Nearest upsampling by two, then the convolution: two adjacent cells and their copies need only three products.
UPSAMPLING = Scheme(
    name="upsampling",
    input_transform=((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    filter_transform=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    output_transform=((1, 1, 0), (0, 1, -1)),
    step=1,
    cells=256,
)
SCHEMES = {scheme.name: scheme for scheme in (PLAIN, UPSAMPLING)}
