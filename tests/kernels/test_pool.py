"""The buffer pool: memory of a decode's maps on the CPU."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halovae.device.memory import LiveBytes
from halovae.kernels.pool import BufferPool

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_referenced_maps_are_not_overwritten(data: st.DataObject) -> None:
    pool = BufferPool(CPU)
    held: list[tuple[Tensor, float]] = []
    for value in range(data.draw(st.integers(1, 25))):
        ends, clears = data.draw(st.booleans()), data.draw(st.booleans())
        if held and ends:
            del held[data.draw(st.integers(0, len(held) - 1))]
        elif clears:
            pool.clear()
        shape = data.draw(SHAPES)
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        made = pool.empty(shape, dtype, kept=data.draw(st.booleans()))
        assert made.shape == shape
        assert made.movedim(1, -1).is_contiguous()
        assert pool.holds(made)
        held.append((made.fill_(value), value))
        assert all(bool((map_ == number).all()) for map_, number in held)


def test_unreferenced_memory_is_reused_for_maps_of_other_sizes() -> None:
    pool = BufferPool(CPU)
    first, view = pool.empty((1, 4, 1, 8, 8), torch.float32), None
    begin, view = first.data_ptr(), first[:, :, 0]
    del first
    assert pool.empty((1, 4, 1, 8, 8), torch.float32).data_ptr() != begin  # the view holds it
    del view
    small, other = (pool.empty((1, 4, 1, 4, 4), torch.float32) for _ in range(2))
    assert small.data_ptr() == begin
    assert other.data_ptr() == begin + small.nbytes
    del small, other
    assert pool.empty((1, 4, 1, 8, 16), torch.float32).data_ptr() == begin


def test_a_map_outlives_its_pool() -> None:
    pool = BufferPool(CPU)
    made = pool.empty((1, 2, 1, 2, 2), torch.float32).fill_(3)
    del pool
    assert made.sum() == 24


def test_clearing_a_pool_returns_memory() -> None:
    pool, size = BufferPool(CPU), 64 * 2**20
    held = pool.empty((1, 1, 1, 1, 7), torch.float32).fill_(5)
    pool.empty((1, 1, 1, 1, size // 4), torch.float32).fill_(1)
    before = psutil.Process().memory_info().rss
    pool.clear()
    assert before - psutil.Process().memory_info().rss > 0.9 * size
    assert held.sum() == 35


def test_large_scratch_memory_is_returned_once_less_is_needed() -> None:
    pool, size = BufferPool(CPU), 128 * 2**20
    for _ in range(2):
        pool.scratch(size // 4).fill_(1)
    before = psutil.Process().memory_info().rss
    pool.scratch(size // 4).fill_(1)
    pool.scratch(size // 6).fill_(1)  # more than half
    assert abs(before - psutil.Process().memory_info().rss) < 0.1 * size
    pool.scratch(size // 16)
    assert before - psutil.Process().memory_info().rss > 0.9 * size


def test_a_process_with_pools_can_fork() -> None:
    pools = [BufferPool(CPU) for _ in range(2)]
    held = [pool.empty((1, 1, 1, 1, 1), torch.float32, kept=kept).fill_(1) for pool in pools for kept in (False, True)]
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(7,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert len(held) == 4


def test_maps_have_their_own_memory_where_the_system_refuses_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    pool = BufferPool(CPU)
    first, second = (pool.empty((1, 2, 1, 3, 3), torch.float32).fill_(value) for value in (1, 2))
    assert (int(first.sum()), int(second.sum())) == (18, 36)
    assert not pool.holds(first)
    pool.clear()


def test_maps_are_counted_while_they_live() -> None:
    pool, shape = BufferPool(CPU), (1, 4, 2, 8, 8)
    size = 4 * math.prod(shape)
    with LiveBytes() as live:
        made = [pool.empty(shape, torch.float32) for _ in range(3)]
        scratch = pool.scratch(10)
        assert live.live == 3 * size + 40
        made.clear()
        assert live.live == 40
        del scratch
    assert (live.live, live.peak) == (0, 3 * size + 40)
