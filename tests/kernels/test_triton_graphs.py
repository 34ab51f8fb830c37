"""Whole decoders by Triton kernels, in Triton's interpreter: which kernels a recorded graph reaches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import halovae
from halovae import Grid
from halovae.bench import on_grids
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.models import zoo
from halovae.plane import backends, windows
from halovae.plane.strip_program import InStrips
from halovae.runtime.options import Sharing

kernels: Any = pytest.importorskip("halovae.kernels.triton_kernels", exc_type=ImportError)
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}


class Counted:
    """The kernels, with a count of their calls; sums with a residual count by themselves."""

    def __init__(self) -> None:
        self.calls = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        kernel, place = getattr(kernels, name), {"norm_of_cells": 6, "moments": 3}.get(name)

        def call(*args: Any) -> Any:
            with_sum = place is not None and len(args) > place and args[place] is not None
            self.calls[f"{name} of a sum" if with_sum else name] += 1
            return kernel(*args)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Use the kernels on the CPU, and count them."""
    used = Counted()
    monkeypatch.setattr(backends, "kernels", lambda kind: None if kind == "meta" else used)
    return used.calls


GROUPS = {"group_norm", "moments", "moments of a sum", "as_bytes"}
CELLS = {"norm_of_cells", "norm_of_cells of a sum", "as_bytes"}
HALOS = {"packed", "unpack", "upsample"}


@pytest.mark.parametrize(
    ("name", "grid", "reached"),
    [
        ("AutoencoderKLFlux2", "1x1", GROUPS | {"upsample"}),
        ("AutoencoderKLFlux2", "2x2", GROUPS | HALOS | {"together"}),
        ("AutoencoderKLWan (2.1)", "1x1", CELLS | {"upsample"}),
        ("AutoencoderKLWan (2.1)", "2x1", CELLS | HALOS),
    ],
)
def test_a_decoder_reaches_each_kernel_and_equals_the_plain_module(
    name: str, grid: str, reached: set[str], counted: Counter[str]
) -> None:
    entry, shape = ENTRIES[name], Grid.parse(grid)
    x = on_grids.example(entry, "decode", torch.float64)
    expected = on_grids.plain(entry, "decode", torch.float64)
    programs: list[Any] = []

    def rank(mesh: Mesh) -> tuple[Tensor, Tensor]:
        module = zoo.build(entry, torch.float64)
        sharded = halovae.shard(lambda z: zoo.decode(module, z), module)
        with torch.no_grad():
            frames = sharded(x, mesh=mesh)
            pictures = sharded(x, mesh=mesh, convert=Sharing(dtype=torch.uint8).convert)
        assert sharded.report is not None
        assert sharded.report.eager == ""
        programs.append(sharded.report)
        assert frames is not None
        assert pictures is not None
        return frames, pictures

    results = on_threads(shape, torch.device("cpu"), rank) if shape.size > 1 else [rank(Mesh(shape, x.device))]
    for frames, pictures in results:
        assert on_grids.error([frames], expected) <= entry.bound
        assert torch.equal(pictures, frames.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))
    assert {kernel for kernel in reached if not counted[kernel]} == set()
    for report in programs:
        assert report.passes["sums"] > 0


@pytest.mark.usefixtures("counted")
def test_sums_are_not_moved_past_other_readers_of_their_memory() -> None:
    from plane.passes.cases import Block, check, seeded, targets
    from plane.test_trace import picture
    from torch import nn

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(4, 4), Block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.first.conv1(torch.relu(x))
            total = x * 2 + self.first.conv2(inner)
            other = torch.relu(total)  # reads the sum before the norm does
            return self.second.conv1(torch.nn.functional.silu(self.second.norm1(total))) + other + total

    for program in check(seeded(Twice), picture(1, 4, 9, 8)):
        found = [node for node in program.nodes() if node.target is windows.convolution]
        assert all("plus" not in node.kwargs for node in found)
        assert windows.added_ in targets(program) or windows.added in targets(program)


def test_strips_by_kernels_equal_the_plain_module(counted: Counter[str]) -> None:
    entry = ENTRIES["AutoencoderKLFlux2"]
    module = zoo.build(entry, torch.float64)
    x = torch.randn(1, 8, 22, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sharded = halovae.shard(lambda z: zoo.decode(module, z), module)
    with torch.no_grad():
        expected = zoo.decode(module, x)
        found = sharded(x, strips=InStrips(2, "rows"))
    assert found is not None
    assert on_grids.error([found], expected) <= entry.bound
    assert counted["group_norm"] > 0
    assert counted["add"] + counted["moments of a sum"] > 0
