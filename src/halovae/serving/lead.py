"""How rank 0 leads the other ranks through what it was told to do."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")
IDLE = 2.0  # seconds after which rank 0 says that there is nothing, and so notices that a rank has ended
_AGREEMENT = timedelta(seconds=10)


class Lead:
    """A line from rank 0 to all others, for one thread of each; making one is a collective call."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # Ranks other than 0 wait as long as their group lets them, whatever monitored_barrier is told.
        self._agreement = dist.new_group(backend="gloo", timeout=_AGREEMENT) if dist.is_initialized() else None
        self.first = self._group is None or dist.get_rank() == 0

    def say(self, value: Value) -> Value:
        """Rank 0's `value`, picklable, on all ranks."""
        if self._group is None:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self._group, device=torch.device("cpu"))
        return said[0]

    def all_say(self, value: Value) -> list[Value]:
        """Every rank's `value`, in the order of the ranks."""
        if self._group is None:
            return [value]
        everyone: list[Value] = [value] * dist.get_world_size()
        dist.all_gather_object(everyone, value, self._group)
        return everyone

    def failed_together(self) -> bool:
        """Whether all ranks failed, as with an argument that none of them can serve.

        Asked by a rank that failed. If it is alone, the others wait for messages that will never come.
        """
        if self._agreement is None:
            return True
        try:
            dist.monitored_barrier(self._agreement, timeout=_AGREEMENT)
        except RuntimeError:
            return False
        return True
