"""Check that the programs of all ranks send each other the messages that they wait for.

Rules decide by facts that all ranks know. Passes see one rank's graph, and graphs differ: only the last rank crops the
last row. Ranks therefore compare the messages of their programs before a program runs for the first time.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Scope, Transport
from halovae.plane import context, operators, windows
from halovae.plane.program import Program

# By peer: a digest of the messages with it, as this rank sees them, and one of the same messages as the peer sees them.
MessageDigests = Mapping[int, tuple[str, str]]


def meta_tensor(node: fx.Node) -> Tensor:
    """Return a meta tensor of a node's shape and dtype."""
    return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")


def meta_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Return a node's arguments, with a meta tensor in place of each node."""

    def known(value: Any) -> Any:
        return meta_tensor(value) if isinstance(value, fx.Node) else value

    return list(map(known, node.args)), {name: known(value) for name, value in node.kwargs.items()}


def may_exchange(node: fx.Node) -> bool:
    """Whether an operator may send or receive."""
    return bool(node.meta.get("messages")) or node.target in operators.BETWEEN_RANKS + windows.OPERATORS


def run_without_data(node: fx.Node) -> None:
    """Run an operator on meta tensors, for the messages that it exchanges."""
    args, kwargs = meta_arguments(node)
    target: Any = node.target
    target(*args, **kwargs)


def messages(program: Program, mesh: Mesh) -> list[tuple[int, int, int]]:
    """Return the peer of each message of this rank's program, and the bytes sent and received, in order."""
    recorder = _RecordingTransport(mesh)
    meta_mesh = Mesh(mesh.grid, torch.device("cpu"), recorder)
    known: dict[Any, list[tuple[int, int, int]]] = {}
    found: list[tuple[int, int, int]] = []
    with _disable_current_modes(), torch.inference_mode(), context.on(meta_mesh):
        for node in filter(may_exchange, program.nodes()):
            key = node.target, argument_key(node)
            if key not in known:
                recorder.messages = []
                run_without_data(node)
                known[key] = recorder.messages
            found += known[key]
    return found


def digests(exchanged: Iterable[tuple[int, int, int]]) -> MessageDigests:
    """Digest the messages that a rank exchanges with each other rank, in order; see `messages`."""
    found: dict[int, tuple[Any, Any]] = defaultdict(lambda: (hashlib.sha256(), hashlib.sha256()))
    for peer, sent, received in exchanged:
        mine, theirs = found[peer]
        mine.update(b"%d %d;" % (sent, received))
        theirs.update(b"%d %d;" % (received, sent))
    return {peer: (mine.hexdigest(), theirs.hexdigest()) for peer, (mine, theirs) in found.items()}


def agree(everyone: Sequence[MessageDigests]) -> bool:
    """Whether every rank sends each other rank the messages that it waits for.

    Args:
        everyone: the digests of all ranks.
    """
    nothing = ("", "")
    return all(
        mine == everyone[peer].get(rank, nothing)[1]
        for rank, digests in enumerate(everyone)
        for peer, (mine, _) in digests.items()
    )


class _RecordingTransport(Transport):
    """Records the peer of each message, and the bytes sent and received."""

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


def argument_key(node: fx.Node) -> Any:
    """Return a key that is equal for nodes whose arguments have equal shapes, dtypes and values."""
    kwargs = tuple((name, _value_key(one)) for name, one in sorted(node.kwargs.items()))
    return tuple(map(_value_key, node.args)), kwargs


def _value_key(value: Any) -> Any:
    return (value.meta["shape"], value.meta["dtype"]) if isinstance(value, fx.Node) else value
