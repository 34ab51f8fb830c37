"""Copies of frames to the host: on a stream of their own, in order, while the next chunk is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import latents, reference, vae
from torch import Tensor

import halovae
from halovae.device.copies import HostCopies
from halovae.device.kinds import Device


class FakeStreams:
    """What HostCopies calls on a device's module; it notes the order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: self.log.append(f"wait for {other}"))
        self.Event = lambda: SimpleNamespace(
            record=lambda stream: self.log.append("recorded"), synchronize=lambda: self.log.append("waited")
        )

    def current_stream(self, device: Any) -> str:
        return "decode"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append("copy")
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    """The CPU with streams."""
    found = FakeStreams()
    original = HostCopies.__init__

    def with_streams(self: Any, device: Device) -> None:
        original(self, device)
        self._module, self._stream, self.beside = found, found.Stream(device), True

    monkeypatch.setattr(HostCopies, "__init__", with_streams)
    return found


def test_a_copy_waits_for_queued_work_and_the_host_waits_for_the_copy(streams: FakeStreams) -> None:
    x = torch.randn(2, 3).T
    wait = HostCopies(Device(torch.device("cpu"))).start(x)
    assert streams.log == ["wait for decode", "copy", "recorded"]
    found = wait()
    assert streams.log[-1] == "waited"
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()


def noted(pieces: Any, log: list[str]) -> Iterator[Tensor | None]:
    for chunk in pieces:
        log.append("decoded")
        yield chunk


@pytest.mark.parametrize("budget", [None, 1 << 34])
def test_chunks_are_copied_while_the_next_one_is_decoded_unless_there_is_a_budget(
    budget: int | None, streams: FakeStreams
) -> None:
    z = latents("wan2.1", 4, 4, 5)
    pieces = halovae.load(vae("wan2.1")).stream(z, memory_budget=budget)
    chunks: Any = pieces._chunks
    dim, extent = chunks.dim, chunks.extent
    pieces._chunks = halovae.plane.results.Chunks(noted(chunks, streams.log), dim, extent)
    frames = list[Tensor]()
    for one in pieces.on_host():
        assert one is not None
        streams.log.append("yielded")
        frames.append(one)
    assert (torch.cat(frames, 2) - reference("wan2.1", z)).abs().max() <= 1e-4
    order = [one for one in streams.log if one in ("decoded", "copy", "waited", "yielded")]
    first, then, last = ["decoded", "copy"], ["waited", "yielded"], len(frames) - 1
    if budget is None:
        assert order == [*first, *(first + then) * last, *then]
    else:
        assert order == (first + then) * (last + 1)
    assert pieces.report.seconds >= 0


def test_on_the_cpu_chunks_are_handed_out_as_they_are() -> None:
    z = latents("wan2.1", 3, 4, 5)
    decoder = halovae.load(vae("wan2.1"))
    pieces = decoder.stream(z)
    found = [one for one in pieces.on_host() if one is not None]
    whole = decoder.decode(z)
    assert whole is not None
    assert torch.equal(torch.cat(found, 2), whole)
    x = torch.randn(2)
    assert HostCopies(Device(torch.device("cpu"))).start(x)() is x
