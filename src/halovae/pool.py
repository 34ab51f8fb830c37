"""Memory for the maps of a decode on the CPU, lent again as soon as nobody holds the map that it was lent for.

Fresh memory is slow: the system hands it over page by page, cleared, when it is first written (a fifth of the time of a
bf16 decode). Accelerators need none of this: torch's allocator pools their memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Pool:
    """Blocks of memory that belong to one decode.

    Args:
        device: the CPU, or "meta" for a walk without data. On other devices torch's own allocator is asked for
            each map: it pools memory itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[Tensor] = []
        self._scratch = torch.empty(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A map of `shape` `[B, C, T, H, W]` that holds nothing, channels last, in the tightest block that is idle.

        Where none is large enough the idle ones are let go before there is another, so that the pool never holds more
        than the maps that were needed at once.
        """
        batch, channels, *rest = shape
        if self.device.type not in ("cpu", "meta"):
            return torch.empty((batch, *rest, channels), dtype=dtype, device=self.device).movedim(-1, 1)
        size = math.prod(shape) * dtype.itemsize
        idle = [block for block in self._blocks if _is_idle(block)]
        block = min((block for block in idle if block.numel() >= size), key=len, default=None)
        if block is None:
            gone = {id(one) for one in idle}
            idle.clear()
            self._blocks = [one for one in self._blocks if id(one) not in gone]
            block = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._blocks.append(block)
        return block[:size].view(dtype).view(batch, *rest, channels).movedim(-1, 1)

    def scratch(self, count: int) -> Tensor:
        """`count` fp32 elements that hold nothing, the same memory each time."""
        if self._scratch.numel() < count:
            self._scratch = torch.empty(0)  # let go before there is another
            self._scratch = torch.empty(count, device=self.device)
        return self._scratch[:count]


def _is_idle(block: Tensor) -> bool:
    """Whether no tensor but `block` itself uses its memory: views of views count, which weak references do not see."""
    return int(torch._C._storage_Use_Count(block.untyped_storage()._cdata)) <= 2  # the block, and the asking itself
