"""Rank 0 decides what all ranks do next, and broadcasts it."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")
IDLE = 2.0  # seconds after which an idle rank 0 broadcasts anyway, to notice a rank that has ended
_AGREEMENT = timedelta(seconds=10)


class RankZeroBroadcast:
    """Broadcasts from rank 0 to all ranks. Each instance serves one thread per rank; creating one is collective."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # Ranks other than 0 wait for their group's timeout; monitored_barrier ignores its own argument there.
        self._agreement = dist.new_group(backend="gloo", timeout=_AGREEMENT) if dist.is_initialized() else None
        self.is_rank_zero = self._group is None or dist.get_rank() == 0

    def send(self, value: Value) -> Value:
        """Return rank 0's `value` on all ranks. It must be picklable; other ranks' values are ignored."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the `value` of every rank, ordered by rank."""
        if self._group is None:
            return [value]
        values: list[Value] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value, self._group)
        return values

    def failed_together(self) -> bool:
        """Whether all ranks failed, as with an argument that none of them can serve.

        A rank that failed calls this. If only this rank failed, the others wait for messages that never come.
        """
        if self._agreement is None:
            return True
        try:
            dist.monitored_barrier(self._agreement, timeout=_AGREEMENT)
        except RuntimeError:
            return False
        return True
