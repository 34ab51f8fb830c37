"""Captured graphs: their pool's bounds, their own memory, and what happens where nothing can be captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device.recorded_graph import RecordedGraph, recording
from torch import Tensor

from halovae.device import captures as module
from halovae.device.captures import CALLS, LIMIT, Captures
from halovae.device.kinds import Device


class FakeDevice:
    """A device with graphs, and with as much free memory as a test says."""

    free = 1 << 30
    emptied = 0
    is_choosing = False

    def __init__(self) -> None:
        self.module = SimpleNamespace(empty_cache=self._empty)

    def _empty(self) -> None:
        self.emptied += 1

    on_current_stream = staticmethod(nullcontext)

    def event(self) -> Any:
        return None

    def new_capture(self) -> Any:
        graph = RecordedGraph()
        return graph, recording(graph, capture_error_mode="thread_local")

    def memory(self) -> tuple[int, int]:
        return self.free, 1 << 34


class Work:
    """Work that counts how often the host queued it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, given: list[Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x, y = given
        given.clear()
        return (x * 2 + y).transpose(0, 1), x.sum(0)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Captures, Any]]:
    monkeypatch.setenv("HALOVAE_CAPTURE", "1")
    device: Any = FakeDevice()
    yield Captures(device), device
    recording.broken = False


def run(pool: Captures, work: Work, owner: object, key: Any = 0, rows: int = 3, size: int = 100) -> None:
    """Run the work on new values, and check results, also after the next call."""
    x, y = torch.randn(2, rows, 4)
    first = pool.run(owner, key, size, work, [x, y])
    kept = [one.clone() for one in first]
    second = pool.run(owner, key, size, work, [y, x])
    for a, b, found in ((x, y, first), (y, x, second)):
        assert torch.equal(found[0], (a * 2 + b).T)
        assert torch.equal(found[1], a.sum(0))
        assert found[0].data_ptr() not in (x.data_ptr(), y.data_ptr())
    assert all(map(torch.equal, first, kept))  # a replay does not overwrite what was returned


def test_work_is_queued_eagerly_at_first_then_captured_once_and_replayed(pool: tuple[Captures, Any]) -> None:
    captures, work, owner = pool[0], Work(), Work()
    for _ in range(4):
        run(captures, work, owner)
    assert work.calls == CALLS + 1  # the last one while it is captured
    assert (len(captures), captures.replays) == (1, 8 - CALLS)


def test_each_shape_layout_and_owner_has_a_graph_of_its_own_and_the_oldest_goes_first(
    pool: tuple[Captures, Any],
) -> None:
    (captures, device), work, owner = pool, Work(), Work()
    for rows in range(1, LIMIT + 4):
        for _ in range(3):
            run(captures, work, owner, rows=rows)
    assert len(captures) == LIMIT
    assert device.emptied == 3
    before = work.calls
    run(captures, work, owner, rows=LIMIT + 3)
    assert work.calls == before
    run(captures, work, owner, rows=1)  # its graph is gone: eager from now on
    assert work.calls == before + 2
    run(captures, work, Work(), rows=LIMIT + 3)  # another owner
    assert work.calls == before + 4


def test_graphs_go_with_their_owner(pool: tuple[Captures, Any]) -> None:
    captures, work, owner = pool[0], Work(), Work()
    run(captures, work, owner)
    run(captures, work, owner)
    assert len(captures) == 1
    del owner
    assert len(captures) == 0


def test_nothing_is_captured_where_memory_is_short_and_older_graphs_make_room(pool: tuple[Captures, Any]) -> None:
    (captures, device), work, owner = pool, Work(), Work()
    device.free = 4000
    for key, size in (("too large", 2000), ("fits", 500), ("fits if the other goes", 600)):
        for _ in range(3):
            run(captures, work, owner, key, size=size)
        assert len(captures) == int(key != "too large")
    assert device.emptied == 1


def test_graphs_are_released_where_something_else_needs_their_memory(pool: tuple[Captures, Any]) -> None:
    (captures, device), work, owner = pool, Work(), Work()
    assert not captures.release()
    run(captures, work, owner)
    run(captures, work, owner)
    assert captures.release()
    assert (len(captures), captures.allowed, device.emptied) == (0, True, 1)
    run(captures, work, owner)  # eagerly: what was released once is not captured again
    assert (work.calls, len(captures)) == (CALLS + 3, 0)


def test_large_work_is_not_captured(pool: tuple[Captures, Any]) -> None:
    (captures, device), work, owner = pool, Work(), Work()
    device.free = 16 * module.LARGEST
    for _ in range(3):
        run(captures, work, owner, size=module.LARGEST + 1)
    assert (work.calls, len(captures)) == (6, 0)


def test_after_memory_ran_out_all_graphs_go_and_no_more_come(pool: tuple[Captures, Any]) -> None:
    captures, work, owner = pool[0], Work(), Work()
    for _ in range(2):
        run(captures, work, owner)
    captures.clear()
    assert (len(captures), captures.allowed) == (0, False)
    before = work.calls
    run(captures, work, owner)
    assert work.calls == before + 2


def test_work_that_cannot_be_captured_stays_eager_and_is_not_tried_again(pool: tuple[Captures, Any]) -> None:
    captures, work, owner = pool[0], Work(), Work()
    recording.broken = True
    run(captures, work, owner)
    with pytest.warns(RuntimeWarning, match="operator by operator: operation not permitted when stream is capturing"):
        run(captures, work, owner)
    recording.broken = False
    before = work.calls
    run(captures, work, owner)
    assert (work.calls, len(captures)) == (before + 2, 0)


def test_while_algorithms_are_chosen_nothing_is_captured_or_counted(pool: tuple[Captures, Any]) -> None:
    (captures, device), work, owner = pool, Work(), Work()
    device.is_choosing = True
    for _ in range(3):
        run(captures, work, owner)
    device.is_choosing = False
    run(captures, work, owner)
    assert (work.calls, len(captures)) == (8, 0)


def test_a_call_beside_another_threads_is_eager(pool: tuple[Captures, Any]) -> None:
    captures, owner = pool[0], Work()
    inside, go = threading.Event(), threading.Event()

    def slow(given: list[Tensor]) -> Tensor:
        if not inside.is_set():
            inside.set()
            go.wait(10)
        return given[0] + 1

    x = torch.zeros(2)
    for _ in range(CALLS):
        inside.set()
        captures.run(owner, "slow", 1, slow, [x])
    inside.clear()
    other = threading.Thread(target=captures.run, args=(owner, "slow", 1, slow, [x]))
    other.start()
    assert inside.wait(10)
    work = Work()
    for _ in range(3):
        run(captures, work, owner)
    go.set()
    other.join()
    assert (work.calls, len(captures)) == (6, 1)


def test_work_that_was_captured_in_inference_mode_is_replayed_outside_of_it(pool: tuple[Captures, Any]) -> None:
    captures, work, owner = pool[0], Work(), Work()
    with torch.inference_mode():
        for _ in range(2):
            run(captures, work, owner)
    run(captures, work, owner)
    assert (work.calls, len(captures)) == (CALLS + 1, 1)


def test_the_host_has_no_graphs_and_a_variable_turns_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Device(torch.device("cpu")).new_capture() is None
    assert not module.captures(torch.device("cpu")).allowed
    assert Device(torch.device("cuda")).new_capture() is None or torch.cuda.is_available()
    device: Any = FakeDevice()
    monkeypatch.delenv("HALOVAE_CAPTURE", raising=False)
    assert not Captures(device).allowed
    monkeypatch.setenv("HALOVAE_CAPTURE", "1")
    assert Captures(device).allowed
