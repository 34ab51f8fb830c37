"""Rewrites of a recorded graph that make it fast. Each knows operators, never models.

`HALOVAE_PASSES` names those that run, with commas between them; empty for none. By default all run.
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
    norms,
    products,
    residuals,
    upsampling,
)
from halovae.plane.passes.graphs import writes

PASSES: dict[str, Callable[[fx.Graph, Mesh], int]] = {
    "convolutions": convolutions.run,
    "dead-taps": dead_taps.run,
    "identities": identities.run,
    "upsampling": upsampling.run,
    "frames": frames.run,
    "norms": norms.run,
    "products": products.run,
    "copies": copies.run,
    "channels-last": channels_last.run,
    "biases": biases.run,
    "in-place": in_place.run,
    "residuals": residuals.run,
}


def chosen() -> tuple[str, ...]:
    """The passes that run, in their order.

    Raises:
        ValueError: `HALOVAE_PASSES` names one that there is not.
    """
    named = os.environ.get("HALOVAE_PASSES")
    if named is None:
        return tuple(PASSES)
    asked = {name.strip() for name in named.split(",")} - {""}
    if unknown := asked - PASSES.keys():
        raise ValueError(
            f"HALOVAE_PASSES={named}: there is no pass {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(PASSES)}"
        )
    return tuple(name for name in PASSES if name in asked)


def improve(graphs: Iterable[fx.Graph], mesh: Mesh, names: Sequence[str]) -> dict[str, int]:
    """Run passes over a program's graphs.

    A graph that writes to tensors in place stays as it was recorded: passes move and merge what reads them.

    Args:
        graphs: the program's own, and those that it calls.
        mesh: this rank's place.
        names: of the passes, in their order.

    Returns:
        How many changes each made, by its name.
    """
    graphs = list(graphs)
    if any(map(writes, graphs)):
        return {}
    changes = {name: sum(PASSES[name](graph, mesh) for graph in graphs) for name in names}
    for graph in graphs:
        graph.lint()
    return changes
