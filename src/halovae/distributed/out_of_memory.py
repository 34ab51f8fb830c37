"""A rank runs out of memory during a decode: it drains its peers, and all ranks fall back to a leaner grid together.

If the rank stopped at once, its neighbors would wait for halos that never come. It repeats the chunk on meta tensors
instead, and exchanges zeros for the rest of the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halovae.distributed.transport import Scope, Transport

# Messages on the CPU: torch's allocator, C++, and oneDNN, which does not name the cause (a leaner grid is tried once).
_SHORTAGES = ("can't allocate memory", "std::bad_alloc", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out. The CPU's libraries have no class of their own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _SHORTAGES)


class Calls:
    """Counts exchanges, to skip the first ones; shared by the transports of several meshes."""

    def __init__(self, done: int) -> None:
        self._left = done

    def is_due(self) -> bool:
        """Whether the next exchange was not done before."""
        self._left -= 1
        return self._left < 0


class DrainingTransport(Transport):
    """A transport that skips the exchanges that were done before, and exchanges zeros in the others.

    Args:
        transport: the transport of the decode.
        calls: says which exchanges were done.
        device: where messages lie.
    """

    def __init__(self, transport: Transport, calls: Calls, device: torch.device) -> None:
        self.rank, self.world = transport.rank, transport.world
        self._transport, self._calls, self._device = transport, calls, device

    def _void(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        if not self._calls.is_due():
            return lambda: None
        sent, received = ([(peer, self._void(one)) for peer, one in side] for side in (sends, receives))
        return self._transport.start(scope, sent, received)

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        if self._calls.is_due():
            self._transport.all_gather(scope, self._void(own), ranks)
        return [torch.empty_like(own) for _ in range(ranks)]
