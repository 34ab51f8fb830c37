"""Steps of a call: what a caller hears between its convolutions, to show how far it is, or to stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import fx

from halovae.plane.flops import flops


class _Listener:
    """A caller's function, and how far the call is that it hears of."""

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function, self.done, self.total = function, 0, 0


_listener: ContextVar[_Listener | None] = ContextVar("halovae_listener", default=None)


@contextmanager
def on_each_step(function: Callable[[int, int], None]) -> Iterator[None]:
    """Call a function after each step of the calls within the context: decodes and encodes, at once or in strips.

    A step is a convolution, a matrix product, or an attention. A call that runs eagerly, without a recorded graph, has
    no steps. Accelerators compute steps after they are counted.

    Args:
        function: takes the number of steps that are done, and that of all steps of the call, which may be one of
            several rounds of a batch. What it raises ends the call, and reaches the caller. On several ranks it must
            not raise: the others would wait for this rank.
    """
    before = _listener.set(_Listener(function))
    try:
        yield
    finally:
        _listener.reset(before)


def is_heard() -> bool:
    """Whether a caller hears of steps."""
    return _listener.get() is not None


def begin_steps(total: int) -> None:
    """Begin to count the steps of a call."""
    if (listener := _listener.get()) is not None:
        listener.done, listener.total = 0, total


def step() -> None:
    """Count a step. Programs call it."""
    if (listener := _listener.get()) is not None:
        listener.done += 1
        listener.function(listener.done, listener.total)


def is_step(node: fx.Node) -> bool:
    """Whether an operator is a step."""
    return node.op == "call_function" and flops(node) > 0


def count(graph: fx.Graph) -> None:
    """Make a graph call `step` after each of its steps."""
    for node in list(graph.nodes):
        if is_step(node):
            with graph.inserting_after(node):
                graph.call_function(step)
