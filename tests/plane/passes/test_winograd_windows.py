"""Windows of Winograd's convolution, and maps that results overwrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plane.passes.cases import AROUND, Block, Causal, check, seeded
from plane.test_trace import picture, recorded
from torch import fx

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.kernels import winograd
from halovae.kernels.native import compiled
from halovae.plane import context, windows
from halovae.plane.live import root


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [8, 256])
def test_winograd_is_exact_on_any_grid(layout: torch.memory_format, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        winograd, "ROWS", rows
    )  # few: several row blocks, some of them computed during the halo exchange
    module = seeded(Block, torch.float32)
    for size in ((13, 11), (16, 24), (9, 8)):
        check(module, picture(2, 4, *size).float().contiguous(memory_format=layout), atol=2e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("frames", [1, 3])
def test_winograd_of_frames_is_exact_on_any_grid(frames: int) -> None:
    check(seeded(Causal, torch.float32), picture(1, 3, frames, 13, 9).float(), atol=2e-5)


@pytest.mark.usefixtures("always")
def test_only_some_ranks_may_use_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        winograd, "is_profitable", lambda scheme, weight, cells, *_: cells > 40 and weight.dtype != torch.float64
    )
    check(seeded(Block, torch.float32), picture(1, 4, 11, 9).float(), atol=2e-5)


@pytest.mark.usefixtures("always")
def test_a_convolution_overwrites_a_map_without_other_users() -> None:
    module = seeded(Block, torch.float32)
    x = picture(1, 4, 16, 16).float().contiguous(memory_format=torch.channels_last)
    program = check(module, x, (Grid(),), atol=2e-5)[0]
    one, two = (node for node in program.nodes() if node.target is windows.convolution)
    assert (one.kwargs.get("spare"), two.kwargs["spare"]) == (
        None,
        True,
    )  # the first one's input is also the shortcut's
    assert root(two) is one
    mesh, found = Mesh(Grid(), x.device), []

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            found.append(result.data_ptr() if n.target is windows.convolution else None)
            return result

    with context.on(mesh), torch.inference_mode():
        Watched(program._module).run(x)
    first, second = (at for at in found if at is not None)
    assert first == second


def test_half_precision_rounds_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: True)
    module, x = seeded(Block, torch.float32), picture(1, 4, 16, 16).float()
    with torch.no_grad():
        exact = module(x)
        plain = (module.bfloat16()(x.bfloat16()).float() - exact).square().mean()
    for full, *_ in recorded(module, x.bfloat16(), Grid(rows=2), module):
        assert (full.float() - exact).square().mean() < 1.1 * plain


@pytest.mark.slow
def test_compiled_kernels_are_exact() -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__(32, 32)

    module, x = seeded(Wide, torch.float32), picture(1, 32, 36, 34).float()
    with torch.no_grad():
        expected = module(x)
    for grid in (Grid(), Grid(rows=2)):
        for full, program, mesh in recorded(module, x, grid, module):
            assert torch.allclose(full, expected, atol=1e-5)
            if grid.size == 1:
                result = program(x.clone(), mesh, kernels=compiled())
                torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("by_winograd", [False, True])
@pytest.mark.parametrize("name", list(AROUND))
def test_a_convolution_pads_its_map(name: str, by_winograd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "is_profitable", lambda *args: by_winograd)
    make, ndim = AROUND[name]
    dtype, atol = (torch.float32, 1e-5) if by_winograd else (torch.float64, 1e-12)
    x = picture(2, 4, *(3, 13, 11)[-ndim:]).to(dtype)
    for program in check(seeded(make, dtype), x, atol=atol):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        assert node.kwargs.keys() >= {"norm", "silu"}
        assert ("edges" in node.kwargs) is ("repeated" not in name)
        assert ("repeats" in node.kwargs) is (ndim == 3 and name != "reflected")
