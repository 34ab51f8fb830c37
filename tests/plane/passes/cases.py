"""Networks and checks for tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plane.test_trace import recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.plane.agreement import digests, messages
from halovae.plane.program import Program

aten = torch.ops.aten


GRIDS = tuple(map(Grid.parse, ("1x1", "2x1", "1x2", "2x2", "3x1")))


class Block(nn.Module):
    """A residual block of an autoencoder, with its shortcut, and an upsampling after it."""

    def __init__(self, channels: int = 4, outputs: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut, self.upsampled = nn.Conv2d(channels, outputs, 1), nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        total = (self.shortcut(x) + inner) / 1.0
        return self.upsampled(F.interpolate(total, scale_factor=2.0, mode="nearest"))


class Causal(nn.Conv3d):
    """A convolution with causal padding in time, as in Wan."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0)))


class Around(nn.Module):
    """A convolution of a map padded with its own edges, as in HunyuanVideo and LTX-2."""

    def __init__(self, mode: str, ndim: int = 3, before: int = 0) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), (nn.Conv3d if ndim == 3 else nn.Conv2d)(4, 8, 3)
        self.mode, self.widths = mode, (1, 1, 1, 1, *((before, 0) if ndim == 3 else ()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(F.silu(self.norm(x)), self.widths, mode=self.mode))


class Repeated(nn.Module):
    """A residual block as in LTX: a root mean square norm over channels, and the first and last frame repeated."""

    def __init__(self, moved: bool = True, before: int = 1, after: int = 1) -> None:
        super().__init__()
        self.conv, self.times, self.moved = nn.Conv3d(4, 4, 3, padding=(0, 1, 1)), (before, after), moved

    def forward(self, x: Tensor) -> Tensor:
        inner = x.movedim(1, -1) if self.moved else x
        squares = inner.pow(2).mean(-1 if self.moved else 1, keepdim=True)
        inner = inner * torch.rsqrt(squares + 1e-3) if self.moved else inner / torch.sqrt(squares + 1e-3)
        inner = F.silu(inner.movedim(-1, 1) if self.moved else inner)
        before, after = self.times
        first, last = inner[:, :, :1].repeat(1, 1, before, 1, 1), inner[:, :, -1:].repeat(1, 1, after, 1, 1)
        return x + self.conv(torch.cat([part for part in (first, inner, last) if part.shape[2]], 2))


class Causally(nn.Module):
    """A convolution in time of a map whose first frame is repeated, one by one, as in CogVideoX."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv3d(4, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.norm(x))
        return x + self.conv(torch.cat([*[inner[:, :, :1]] * 2, inner], 2))


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def check(module: nn.Module, x: Tensor, grids: tuple[Grid, ...] = GRIDS, atol: float = 1e-12) -> list[Program]:
    with torch.no_grad():
        expected = module(x.clone())
    programs = []
    for grid in grids:
        for full, program, mesh in recorded(module, x, grid, module):
            torch.testing.assert_close(full, expected, rtol=0, atol=atol * float(expected.abs().max()))
            assert (program.messages, program.bytes_sent) == (mesh.traffic.messages, mesh.traffic.bytes)
            assert len(digests(messages(program, mesh))) <= grid.size  # what ranks compare before they run it
            programs.append(program)
    return programs


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.nodes()]


class Cells(nn.Module):
    """The norm over channels, SiLU and causal convolution of Wan's VAE."""

    def __init__(self, least: float = 1e-12) -> None:
        super().__init__()
        self.gamma, self.conv, self.least = nn.Parameter(torch.randn(3, 1, 1, 1)), Causal(), least

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.normalize(x, dim=1, eps=self.least) * 3**0.5 * self.gamma + 0.0
        found: Tensor = self.conv(F.silu(normalized))
        return found


def last(y: Tensor, _: Tensor | None) -> Tensor:
    return y[:, :, -2:].clone()


def added(x: Tensor) -> Tensor:
    x += 1
    return x


Steps = Callable[[nn.Module, Tensor], Tensor]


class Written(nn.Module):
    """Writes in place to tensors that passes would skip over."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.conv, self.norm, self.steps = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), steps
        self.conv3 = nn.Conv3d(4, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def larger(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gated(nn.Module):
    """A linear layer over the channels of a map; one half of its result gates the other, as in DC-AE."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 12), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.linear(x.movedim(1, -1)).movedim(-1, 1).chunk(2, 1)
        return self.after(inner * F.silu(gate))


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of no items": lambda x: F.normalize(F.silu(x)[:0], dim=1).sum() + x,
    "of no rows": lambda x: F.normalize(F.silu(x)[:, :, :0], dim=1).sum() + x,
    "of complex numbers": lambda x: (z := torch.complex(x, x + 1)).mul((z.pow(2).mean(1, True) + 1e-3).rsqrt()).real,
    "of some channels": lambda x: F.normalize(F.silu(x)[:, 1:5], dim=1) * 2.0,
    "of what is not channels last": lambda x: F.normalize(F.silu(x.contiguous()), dim=1) * 2.0,
    "with a weight of the map's own": lambda x: F.normalize(F.silu(x), dim=1) * F.silu(x)[:1, :, :1, :1],
}


class Odd(nn.Module):
    """Graphs that resemble those that passes rewrite, but differ."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two = how, nn.Conv3d(4, 4, 3, padding=(0, 1, 1)), nn.Conv3d(4, 4, 3, padding=(0, 1, 1))
        self.gamma, self.single = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.pad(x, (0, 0, 0, 0, 2, 0)))
        scale = torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-3)
        if self.how == "twice":
            return y + y
        if self.how == "past":
            y = torch.cat([y, F.silu(y)], 2)
        elif self.how == "all dims":
            y = F.silu(y * torch.rsqrt(y.pow(2).mean(dim=None, keepdim=True) + 1e-3))
        elif self.how == "no map":
            y = F.silu(torch.mul(2.0, scale)).expand_as(y)
        elif self.how == "rounded":
            y = F.silu((y * scale).to(torch.bfloat16) * self.gamma)
        elif self.how == "one value":
            moved = y.movedim(1, -1)
            moved = moved * torch.rsqrt(moved.pow(2).mean(-1, keepdim=True) + 1e-3) * self.single
            y = F.silu(moved.movedim(-1, 1))
        elif self.how == "zeros repeated":
            y = F.pad(F.pad(y, (0, 0, 0, 0, 1, 0)), (1, 1, 1, 1, 1, 0), mode="replicate")[..., 1:-1, 1:-1]
        elif self.how == "the same twice":
            first = y[:, :, :1].repeat(1, 1, 1, 1, 1)
            y = torch.cat([first, y[:, :, :1], first], 2)
        return self.two(y)


ODD = ("twice", "past", "all dims", "no map", "rounded", "one value", "zeros repeated", "the same twice")


AROUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "replicated": (lambda: Around("replicate", before=2), 3),
    "replicated, 2-D": (lambda: Around("replicate", 2), 2),
    "reflected": (lambda: Around("reflect"), 3),
    "reflected, 2-D": (lambda: Around("reflect", 2), 2),
    "repeated": (Repeated, 3),
    "repeated before": (lambda: Repeated(False, 2, 0), 3),
    "repeated one by one": (Causally, 3),
}
