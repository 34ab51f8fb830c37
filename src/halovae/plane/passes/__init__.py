"""Passes: rewrites that speed up a recorded graph. They recognize operators, never models.

`HALOVAE_PASSES` lists the passes to run, separated by commas; empty for none. By default all run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane.passes import (
    biases,
    channels_last,
    convolutions,
    copies,
    dead_taps,
    frames,
    identities,
    in_place,
    margins,
    norms,
    products,
    residuals,
    sums,
    upsampling,
)
from halovae.plane.passes.graphs import writes

PASSES: dict[str, Callable[[fx.Graph, Mesh], int]] = {
    "convolutions": convolutions.run,
    "dead-taps": dead_taps.run,
    "identities": identities.run,
    "upsampling": upsampling.run,
    "margins": margins.run,
    "frames": frames.run,
    "norms": norms.run,
    "products": products.run,
    "copies": copies.run,
    "channels-last": channels_last.run,
    "biases": biases.run,
    "in-place": in_place.run,
    "residuals": residuals.run,
    "sums": sums.run,
}


def chosen() -> tuple[str, ...]:
    """Return the names of the passes to run, in order.

    Raises:
        ValueError: `HALOVAE_PASSES` names an unknown pass.
    """
    value = os.environ.get("HALOVAE_PASSES")
    if value is None:
        return tuple(PASSES)
    names = {name.strip() for name in value.split(",")} - {""}
    if unknown := names - PASSES.keys():
        raise ValueError(
            f"HALOVAE_PASSES={value}: there is no pass {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(PASSES)}"
        )
    return tuple(name for name in PASSES if name in names)


def improve(graphs: Iterable[fx.Graph], mesh: Mesh, names: Sequence[str]) -> dict[str, int]:
    """Run passes over a program's graphs.

    If a graph writes to tensors in place, no pass runs: passes move and merge nodes that read tensors.

    Args:
        graphs: the program's graph and the graphs that it calls.
        mesh: the mesh, with this rank's position.
        names: the passes to run, in order.

    Returns:
        The number of changes by each pass, by name.
    """
    graphs = list(graphs)
    if any(map(writes, graphs)):
        return {}
    changes = {name: sum(PASSES[name](graph, mesh) for graph in graphs) for name in names}
    for graph in graphs:
        graph.lint()
    return changes
