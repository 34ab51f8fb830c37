"""A decode as it is measured: its frames as they get finished, and what it took."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from halovae.fallback import drain_peers
from halovae.lines import world_size
from halovae.loop import Loop, Request
from halovae.memory import MemoryMeter
from halovae.mesh import Mesh, Traffic, mesh_for
from halovae.models.wan import WanDecoder
from halovae.out_of_memory import is_out_of_memory
from halovae.planning.choose import Decision
from halovae.planning.plan import Plan
from halovae.platform import Stopwatch
from halovae.report import DecodeReport, RankReport


class FrameStream(Iterator[Tensor | None]):
    """Finished frames of a decode, chunk by chunk, as `Decoder.stream` describes them.

    A chunk is decoded when the next item is asked for. After the last one `report` says what the decode took.

    Attributes:
        latents: what is decoded.
    """

    def __init__(
        self, model: WanDecoder, latents: Tensor, plans: Sequence[Plan], request: Request, first_use: bool,
        decision: Decision | None = None, mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        self._model, self.latents, self._plans, self._request = model, latents, list(plans), request
        self._first_use, self._decision, self._mesh = first_use, decision, mesh
        self._meshes = self._meshes_of(plans[0])
        platform = self._meshes[0].platform
        self._traffic, self._clock = Traffic(platform), Stopwatch(platform)
        self._chunks = self._measured()
        self._fell_back = ""
        self._own: RankReport | None = None

    @property
    def _plan(self) -> Plan:
        return self._plans[0]

    def _meshes_of(self, plan: Plan) -> list[Mesh]:
        if self._mesh is not None:
            return [self._mesh]
        device, world = next(self._model.parameters()).device, world_size()
        return [mesh_for(one.grid, device, one.grid.size < world and not plan.apart) for one in plan.stages]

    def __next__(self) -> Tensor | None:
        return next(self._chunks)

    def close(self) -> None:
        """Decode no further."""
        self._chunks.close()

    def join(self) -> Tensor | None:
        """All frames at once: `[B, 3, T', H', W']` on the ranks that receive any, None on the others."""
        frames, done, out = self._model.config.frames(self.latents.shape[2]), 0, None
        for piece in self:
            if piece is None:
                continue
            if piece.shape[2] == frames:
                out = piece
                continue
            if out is None:
                out = piece.new_empty(*piece.shape[:2], frames, *piece.shape[3:])
            out[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
        return out

    @property
    def report(self) -> DecodeReport:
        """What this rank took.

        Raises:
            RuntimeError: frames are still to come.
        """
        if self._own is None:
            raise RuntimeError("the report of a decode is there once its last frames have been taken")
        latents, config = self.latents.shape, self._model.config
        factor = config.spatial_factor
        return DecodeReport(
            family=config.family,
            latents=tuple(latents),
            frames=(latents[0], 3, config.frames(latents[2]), latents[3] * factor, latents[4] * factor),
            dtype=str(next(self._model.parameters()).dtype).removeprefix("torch."),
            device=self._meshes[0].platform.kind,
            grid=self._plan.grid,
            chunk=self._plan.chunk,
            halo_depths=dict(self._plan.depths),
            bands=self._plan.bands,
            first_use=self._first_use,
            decision=None if self._decision is None else self._decision.as_dict(),
            fell_back=self._fell_back,
            ranks=(self._own,),
        )

    def shared_report(self) -> DecodeReport:
        """What every rank took; all ranks ask for it, and all get it."""
        return replace(self.report, ranks=tuple(self._meshes[0].lines.all_values(self.report.ranks[0])))

    def _measured(self) -> Generator[Tensor | None, None, None]:
        mesh = self._meshes[0]
        memory = MemoryMeter(mesh.platform, by_thread=mesh.lines.shared_device)
        done = frames_yielded = 0
        loop = self._started()
        spans = self._plan.chunks(self.latents.shape[2])
        while done < len(spans):
            with memory.counting(), self._clock.running():
                frames = self._next(loop, done)
            if self._ran_out:
                frames = None
                self._lean()
                loop, done, spans = self._started(), 0, self._plan.chunks(self.latents.shape[2])
                continue
            done += 1
            final = self._model.config.frames(spans[done - 1].stop)
            if final > frames_yielded:  # else it was yielded before memory ran out
                fresh, frames_yielded = final - frames_yielded, final
                yield frames if frames is None else frames[:, :, -fresh:]
            del frames
        traffic = self._traffic
        self._own = RankReport(
            rank=mesh.rank,
            seconds=self._clock.seconds(),
            waiting=traffic.waiting.seconds(),
            messages=traffic.messages,
            bytes_sent=traffic.bytes,
            memory=memory.read(),
        )

    def _started(self) -> Generator[Tensor | None, None, None]:
        self._calls, self._ran_out = self._traffic.calls, False
        return Loop(self._model, self.latents, self._plan, self._meshes, self._request, self._traffic).chunks()

    def _next(self, loop: Generator[Tensor | None, None, None], done: int) -> Tensor | None:
        """The next chunk's frames. Where there is a leaner plan and memory runs out on any rank, all ranks note it."""
        if len(self._plans) == 1:
            return next(loop)
        frames, failed = None, False
        try:
            frames = next(loop)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # what it held
            failed = True
        if failed:
            calls = self._traffic.calls - self._calls
            drain_peers(self._model, self.latents, self._plan, self._meshes, self._request, done + 1, calls)
        self._ran_out = self._meshes[0].lines.anyone(failed)
        return frames

    def _lean(self) -> None:
        """Turn to the next plan."""
        self._fell_back = f"memory ran out with {self._plan}"
        del self._plans[0]
        self._meshes = self._meshes_of(self._plan)
