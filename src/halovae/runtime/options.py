"""What a caller asks of a call, how ranks share it, and what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from halovae.device.regions import region
from halovae.distributed.mesh import Mesh, mesh_for, mesh_over
from halovae.distributed.transport import world_size
from halovae.grid import Grid
from halovae.kernels.native import Kernels
from halovae.plane import backends
from halovae.plane.results import Gather
from halovae.plane.strip_program import InStrips
from halovae.planning.decision import Decision

Call = Literal["decode", "encode"]
Mode = Literal["auto", "single", "parallel"]


class EncodeOptions(TypedDict, total=False):
    """Keyword arguments of `VAE.encode`; see there."""

    mode: Mode
    grid: Grid | None
    gather: Gather
    memory_budget: int | None
    mesh: Mesh | DeviceMesh | None
    group: dist.ProcessGroup | None
    module_kwargs: Mapping[str, Any] | None


class DecodeOptions(EncodeOptions, total=False):
    """Keyword arguments of `VAE.stream` and of what decodes by it; see there."""

    dtype: torch.dtype | None
    denormalize: bool


@dataclass(frozen=True)
class Sharing:
    """How ranks share a call, as a caller asks for it; see `VAE.stream`."""

    mode: Mode = "auto"
    grid: Grid | None = None
    gather: Gather = "rank0"
    dtype: torch.dtype | None = None
    memory_budget: int | None = None
    mesh: Mesh | None = field(default=None, repr=False)  # ranks compare what they are asked by its text
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, options: Mapping[str, Any], device: torch.device) -> Sharing:
        """Read the options that say how ranks share a call; others are left out. Collective for a new `DeviceMesh`.

        Args:
            options: `DecodeOptions` or `EncodeOptions`.
            device: where the exchanged tensors live.

        Raises:
            ValueError: a `DeviceMesh` with other dims, or one without this rank, or a group without it.
            TypeError: a mesh or a group of another type.
        """
        names = {one.name for one in fields(cls)} - {"mesh"}
        given = {name: value for name, value in options.items() if name in names}
        group: Any = options.get("group")
        if group is not None and options.get("mesh") is None:
            if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
                raise TypeError(f"group: expected a ProcessGroup, got {type(group).__name__}")
            world_size(options["group"])
        return cls(**given, mesh=mesh_over(options.get("mesh"), device))

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return world_size(self.group) if self.mesh is None else self.mesh.transport.world

    def everyone(self, device: torch.device) -> Mesh:
        """Return the mesh over which all ranks agree."""
        return self.mesh or mesh_for(Grid(rows=self.world), device, self.group)

    def check(self) -> None:
        """Check all but the grid, which the mesh checks.

        Raises:
            ValueError: an unknown mode or gather, a budget below 1, or a grid or a group beside a mesh that has
                another.
            TypeError: a dtype that pictures cannot have.
        """
        for name, value, known in (("mode", self.mode, get_args(Mode)), ("gather", self.gather, get_args(Gather))):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if self.mesh is not None and self.grid not in (None, self.mesh.grid):
            raise ValueError(f"grid {self.grid} is not the grid of the given mesh, {self.mesh.grid}: leave one out")
        if self.mesh is not None and self.group is not None:
            raise ValueError("group and mesh both name the ranks: leave one out")
        if self.memory_budget is not None and not (isinstance(self.memory_budget, int) and self.memory_budget > 0):
            raise ValueError(f"memory_budget={self.memory_budget!r}: expected a number of bytes > 0")
        if self.dtype is not None and not self.dtype.is_floating_point and self.dtype != torch.uint8:
            raise TypeError(f"dtype={self.dtype}: expected a floating dtype or torch.uint8")

    @property
    def captures(self) -> bool:
        """Whether captured graphs may keep memory between calls."""
        return self.memory_budget is None

    @property
    def convert(self) -> Callable[[Tensor], Tensor] | None:
        """What each rank does to its pictures before it sends them: uint8 is a quarter of fp32."""
        dtype = self.dtype
        if dtype is None:
            return None
        return lambda own: _converted(own, dtype)


def _converted(own: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures in [-1, 1] as contiguous `dtype`."""
    fused = backends.kernels(own.device.type)
    with region("conversion"):
        if dtype == torch.uint8 and fused is not None and backends.takes(own):
            frames: Tensor = fused.as_bytes(own)
            return frames
        if dtype == torch.uint8:
            own = own.float().clamp(-1, 1).add_(1).mul_(127.5).round_()
        return own.to(dtype, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Choice:
    """How ranks share a call.

    Attributes:
        grid: of ranks.
        items: how many of the batch go at once; one round after the other.
        decision: why, if that was predicted.
        kept: bytes of the pictures, which a rank that receives them holds besides.
        leaner: how they share it if memory runs out; None if there is no leaner way.
        kernels: what it was planned for; None where it was not planned: `Sharded` decides.
        strips: how a rank that has all rows and cols computes them; None for at once.
    """

    grid: Grid
    items: int
    decision: Decision | None = None
    kept: int = 0
    leaner: Choice | None = None
    kernels: Kernels | None = None
    strips: InStrips | None = None
