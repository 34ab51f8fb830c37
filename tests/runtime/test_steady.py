"""What a decode does again and again: no map changes its layout, none is copied unseen, no chunk takes more memory."""

from typing import Any

import pytest
import torch
from samples import latents
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import halovae
from halovae.device.memory import LiveBytes
from halovae.models.architectures import random_vae
from halovae.runtime.pictures import PictureStream

# What is smaller: latents, the tokens of the attention, weights. torch has its own way with those.
MAP = 2**16
FAMILIES = ["wan2.1", "wan2.2-5b"]  # Qwen-Image is Wan2.1 here


class Watch(TorchDispatchMode):
    """Notes maps that are made in another layout than channels-last, and copies that no line of ours asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self.odd: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for one in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(one, Tensor) and one.ndim >= 4 and one.numel() >= MAP and one.shape[1] > 4:
                self.made += 1
                if name in ("convolution", "mkldnn_convolution", "empty", "cat") and one.stride(1) != 1:
                    self.odd.append(f"{name} {list(one.shape)} {one.stride()}")
                if name in ("clone", "_to_copy", "contiguous") and one.data_ptr() != args[0].data_ptr():
                    self.copies.append(f"{name} {list(one.shape)}")
        return result


def started(family: str, chunks: int) -> PictureStream:
    """A stream of which so many chunks are decoded."""
    stream = halovae.load(random_vae(family, 16)).stream(latents(family, frames=6, height=12, width=12))
    for _ in range(chunks):
        next(stream)
    return stream


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_stay_as_they_lie_and_are_not_copied(family: str) -> None:
    stream = started(family, 2)
    with Watch() as watch:
        next(stream)
    assert watch.made > 50
    assert watch.odd == []
    # One upsampling's cache is a copy. Wan2.2's shortcuts repeat channels, lay them out, and cut frames.
    assert len(watch.copies) <= (9 if family == "wan2.2-5b" else 1), watch.copies


class Fresh(LiveBytes):
    """Counts what does not lie in the pool, and notes how much of the pool's addresses is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.top = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.halovae.buffer.default:
            self.top = max(self.top, sum(args[1:]))
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_steady_chunks_take_no_fresh_memory(family: str) -> None:
    stream = started(family, 2)
    with Fresh() as first:
        next(stream)
        next(stream)
    with Fresh() as steady:
        next(stream)
    assert 0 < steady.top <= 1.1 * first.top  # caches change places, and maps find other gaps
    assert steady.peak <= first.peak


def test_no_chunk_takes_more_memory_than_the_one_before() -> None:
    stream, peaks = started("wan2.1", 2), []
    for _ in range(3):
        with LiveBytes() as live:
            next(stream)
        peaks.append((live.peak, live.live))
    assert peaks[0] == peaks[1] == peaks[2]
    assert peaks[0][0] > 0
