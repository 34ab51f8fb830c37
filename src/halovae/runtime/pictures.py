"""Pictures of any autoencoder as they get finished, and what the decode took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from halovae.device.copies import HostCopies
from halovae.device.memory import Memory, MemoryMeter
from halovae.distributed.mesh import Mesh
from halovae.plane.results import Chunks, ShardReport
from halovae.report import DecodeReport, RankReport

if TYPE_CHECKING:
    from halovae.runtime.options import Choice
    from halovae.runtime.plane_call import PlaneCall


class PictureStream(Iterator["Tensor | None"]):
    """Finished frames of a decode, as `VAE.stream` describes them.

    A chunk is decoded when the next item is asked for. After the last one `report` says what the decode took.

    Args:
        latents: what it decodes.
        choice: how ranks share them.
        chunks: its result.
        call: what makes them.
        everyone: the mesh of all ranks.
        ahead: whether `on_host` may decode a chunk while the one before it is still on the device.

    Attributes:
        latents: what is decoded.
    """

    def __init__(
        self, latents: Tensor, choice: Choice, chunks: Chunks, call: PlaneCall, everyone: Mesh, ahead: bool = True
    ) -> None:
        self.latents, self._choice, self._call = latents, choice, call
        self._chunks, self._ahead = chunks, ahead
        self._mesh = everyone
        self._memory = MemoryMeter(self._mesh.device, by_thread=self._mesh.transport.shared_device)
        # Of the whole decode, once it has ended. Its seconds are read when asked for, since that waits for the device.
        self._taken: tuple[ShardReport, Memory, str] | None = None

    def __next__(self) -> Tensor | None:
        try:
            with self._memory.counting():
                return next(self._chunks)
        except StopIteration:
            taken = self._call.report
            if self._taken is None and taken is not None:
                self._taken = taken, self._memory.read(), self._call.fell_back
            raise

    def on_host(self) -> Iterator[Tensor | None]:
        """Yield the frames in the host's memory. On an accelerator, a chunk is copied while the next one is decoded.

        The copy runs on a stream of its own. So each chunk is yielded after the next one was queued, unless the decode
        has a memory budget: two chunks would then be on the device. All ranks may call this, or take chunks directly.
        """
        copies = HostCopies(self._mesh.device)
        started: list[Callable[[], Tensor | None]] = []
        for chunk in self:
            started.append(_nothing if chunk is None else copies.start(chunk))
            del chunk
            if len(started) > (copies.beside and self._ahead):
                yield started.pop(0)()
        while started:
            yield started.pop(0)()

    def close(self) -> None:
        """Decode no further."""
        self._chunks.close()

    def join(self, convert: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """All frames at once, on the ranks that receive any; None on the others.

        Args:
            convert: applied to each chunk before it is joined to the others; it may move the chunk to another device.
        """
        return Chunks(self, self._chunks.dim, self._chunks.extent).join(convert)

    @property
    def report(self) -> DecodeReport:
        """What this rank took.

        Raises:
            RuntimeError: frames are still to come.
        """
        if self._taken is None:
            raise RuntimeError("the report of a decode is there once its last frames have been taken")
        taken, memory, fell_back = self._taken
        rank = self._mesh.transport.rank
        own = RankReport(rank, taken.seconds, taken.waiting, taken.messages, taken.bytes_sent, memory)
        shape = taken.shape if len(taken.shape) == 5 else (*taken.shape[:2], 1, *taken.shape[2:])
        decision, sizes = self._choice.decision, self._call.sizes
        return DecodeReport(
            family=type(self._call.vae).__name__ if sizes is None else sizes.family,
            latents=tuple(self.latents.shape),
            frames=(self.latents.shape[0], *shape[1:]),
            dtype=str(self.latents.dtype).removeprefix("torch."),
            device=self._mesh.device.kind,
            grid=str(taken.grid),
            first_use=taken.recorded > 0,
            compiled=taken.compiled,
            decision=None if decision is None else decision.as_dict(),
            fell_back=fell_back,
            ranks=(own,),
        )

    def shared_report(self) -> DecodeReport:
        """What every rank took; all ranks ask for it, and all get it."""
        return replace(self.report, ranks=tuple(self._mesh.transport.all_values(self.report.ranks[0])))


def _nothing() -> None:
    """Stands for a chunk that this rank does not receive."""
