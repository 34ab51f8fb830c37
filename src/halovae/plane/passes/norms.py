"""GroupNorm and SiLU before a convolution become a part of it: a map is normalized into what the convolution reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.passes.graphs import only_user, replaced

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many norms and activations went."""
    found = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution:
            continue
        x: Any = node.args[0]
        *others, gamma, beta, norm, silu = node.args[1:]
        gone = []
        if not silu and norm is None and only_user(x, aten.silu.default):
            gone.append(x)
            x, silu = x.args[0], True
        if norm is None and only_user(x, operators.group_norm):
            gone.append(x)
            x, gamma, beta, groups, eps, scope, counts = x.args
            norm = groups, eps, scope, counts
        elif norm is None and only_user(x, operators.whole_group_norm):
            gone.append(x)
            x, groups, gamma, beta, eps = x.args
            norm = groups, eps, "plane", ()
        if gone:
            replaced(node, windows.convolution, (x, *others, gamma, beta, norm, silu), *gone)
            found += len(gone)
    return found
