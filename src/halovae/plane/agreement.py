"""Whether the programs of all ranks send each other the messages that they wait for.

Rules decide by what all ranks know. Passes see one rank's graph, which may have an operator more than another rank's:
only the last rank crops the last row. Before a program runs for the first time, ranks compare what it will send.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Scope, Transport
from halovae.plane import context, operators, windows
from halovae.plane.program import Program

Conversations = Mapping[int, tuple[str, str]]  # by peer: digests of what it is sent and sends, and of the reverse


def meta_tensor(node: fx.Node) -> Tensor:
    """A tensor of a node's shape and dtype, without data."""
    return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")


def meta_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """A node's arguments, with tensors without data for nodes."""

    def known(value: Any) -> Any:
        return meta_tensor(value) if isinstance(value, fx.Node) else value

    return list(map(known, node.args)), {name: known(value) for name, value in node.kwargs.items()}


def may_exchange(node: fx.Node) -> bool:
    """Whether an operator may send or receive."""
    return bool(node.meta.get("messages")) or node.target in operators.BETWEEN_RANKS + windows.OPERATORS


def run_without_data(node: fx.Node) -> None:
    """Run an operator on tensors without data, for the messages that it exchanges."""
    args, kwargs = meta_arguments(node)
    target: Any = node.target
    target(*args, **kwargs)


def conversations(program: Program, mesh: Mesh) -> Conversations:
    """What this rank's program exchanges with each other rank, in order."""
    noted = _Noted(mesh)
    place = Mesh(mesh.grid, torch.device("cpu"), noted)
    known: dict[Any, list[tuple[int, int, int]]] = {}
    digests: dict[int, tuple[Any, Any]] = defaultdict(lambda: (hashlib.sha256(), hashlib.sha256()))
    with _disable_current_modes(), torch.inference_mode(), context.on(place):
        for node in filter(may_exchange, program.nodes()):
            key = node.target, likeness(node)
            if key not in known:
                noted.messages = []
                run_without_data(node)
                known[key] = noted.messages
            for peer, sent, received in known[key]:
                mine, theirs = digests[peer]
                mine.update(b"%d %d;" % (sent, received))
                theirs.update(b"%d %d;" % (received, sent))
    return {peer: (mine.hexdigest(), theirs.hexdigest()) for peer, (mine, theirs) in digests.items()}


def agree(everyone: Sequence[Conversations]) -> bool:
    """Whether what each rank sends to each other one is what that one waits for."""
    nothing = ("", "")
    return all(
        mine == everyone[peer].get(rank, nothing)[1]
        for rank, conversations in enumerate(everyone)
        for peer, (mine, _) in conversations.items()
    )


class _Noted(Transport):
    """Notes for each message the peer, and the bytes sent and received."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world, self._grid = mesh.rank, mesh.grid.size, mesh.grid
        self.messages: list[tuple[int, int, int]] = []

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        sent = Counter[int]()
        received = Counter[int]()
        for peer, x in sends:
            sent[peer] += x.nbytes
        for peer, x in receives:
            received[peer] += x.nbytes
        self.messages += [(peer, sent[peer], received[peer]) for peer in sorted({*sent, *received})]
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        place = self._grid.coordinates(self.rank)
        fixed = {"plane": (0,), "rows": (0, 2), "cols": (0, 1)}.get(scope, ())
        for peer in range(self.world):
            there = self._grid.coordinates(peer)
            if peer != self.rank and all(there[at] == place[at] for at in fixed):
                self.messages.append((peer, own.nbytes, own.nbytes))
        return [torch.empty_like(own) for _ in range(ranks)]


def likeness(node: fx.Node) -> Any:
    """Equal for nodes whose arguments have equal shapes, dtypes and values."""
    return tuple(map(_likeness, node.args)), tuple((name, _likeness(one)) for name, one in sorted(node.kwargs.items()))


def _likeness(value: Any) -> Any:
    return (value.meta["shape"], value.meta["dtype"]) if isinstance(value, fx.Node) else value
