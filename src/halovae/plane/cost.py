"""What a recorded graph takes: FLOPs, bytes, messages, by kind of operator."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from halovae.plane import operators
from halovae.plane.live import shares
from halovae.plane.program import Program

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default)


@dataclass
class Work:
    """Work of one kind.

    Attributes:
        calls: how many operators.
        flops: multiplications and additions of convolutions, matrix products and attention.
        bytes: read and written.
    """

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class RankCost:
    """What one rank takes to run its program.

    Attributes:
        work: by kind of operator: convolution, product, attention, norm, exchange, view, other.
        messages: that it sends.
        bytes_sent: their size.
        peak: bytes of live tensors at the highest point, weights apart.
    """

    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    messages: int = 0
    bytes_sent: int = 0
    peak: int = 0

    @property
    def flops(self) -> float:
        """Of all kinds."""
        return sum(work.flops for work in self.work.values())


def cost(program: Program) -> RankCost:
    """Add up what the nodes of a rank's program take."""
    found = RankCost(peak=program.peak)
    for node in program.nodes():
        work = found.work[kind(node)]
        work.calls += 1
        work.flops += flops(node)
        if not shares(node):
            work.bytes += _bytes(node) + sum(map(_bytes, node.all_input_nodes))
        found.messages += node.meta.get("messages", 0)
        found.bytes_sent += node.meta.get("sent", 0)
    return found


def kind(node: fx.Node) -> str:
    """The kind of an operator."""
    target: Any = node.target
    if target in (operators.fetch, operators.gather):
        return "exchange"
    if target in (operators.group_norm, operators.whole_group_norm):
        return "norm"
    if target is operators.attention:
        return "attention"
    if target in _CONVOLUTIONS:
        return "convolution"
    if target in _PRODUCTS:
        return "product"
    return "view" if shares(node) else "other"


def flops(node: fx.Node) -> float:
    """Two for each multiplication and addition, as `torch.utils.flop_counter` counts them."""
    target: Any = node.target
    result = math.prod(node.meta.get("shape", ()))
    if target in _CONVOLUTIONS:
        weight = _shape(node.args[1])
        transposed = bool(node.args[6])
        return 2.0 * (math.prod(_shape(node.args[0])) if transposed else result) * math.prod(weight[1:])
    if target in _PRODUCTS:
        inner = _shape(node.args[1 if target in (aten.addmm.default, aten.baddbmm.default) else 0])[-1]
        return 2.0 * result * inner
    if target is operators.attention:
        query, key = _shape(node.args[0]), _shape(node.args[1])
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + _shape(node.args[2])[-1])
    return 0.0


def _shape(argument: Any) -> tuple[int, ...]:
    found: tuple[int, ...] = argument.meta["shape"]
    return found


def _bytes(node: fx.Node) -> int:
    return int(node.meta.get("bytes", 0))
