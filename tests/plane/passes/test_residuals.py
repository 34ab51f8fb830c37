"""Sums that become part of the convolution before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plane.passes.cases import GRIDS, Gated, aten, check, seeded, targets
from plane.test_trace import picture, recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.device.kinds import Device
from halovae.plane import passes, windows
from halovae.plane.live import root
from halovae.plane.passes import residuals


class Residual(nn.Module):
    """A map and the result of two convolutions of it, added by `add`."""

    def __init__(self, add: Callable[[Any, Tensor], Tensor], ndim: int = 2) -> None:
        super().__init__()
        kind: Any = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.first, self.one, self.two = (kind(4, 4, 3, padding=1) for _ in range(3))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(F.silu(self.one(F.silu(x))))
        return found


def residual_first(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return x + module.inner(x)


def residual_second(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return module.inner(x) + x


def residual_of_a_shortcut(module: Any, x: Tensor) -> Tensor:
    found: Tensor = module.first(x) + module.inner(x)
    return found


def residual_of_chunks(module: Any, x: Tensor) -> Tensor:
    past, found = None, []
    for chunk in x.split(2, 2):  # no calls of modules, which would become separate graphs
        y = F.conv3d(chunk, module.first.weight, padding=1)
        inner = F.silu(F.conv3d(y, module.one.weight, padding=1))
        taken = inner if past is None else torch.cat([past, inner], 2)
        past = inner[:, :, -2:].clone()
        padded = F.pad(taken, (1, 1, 1, 1, 4 - taken.shape[2], 0))
        found.append(y + F.conv3d(padded, module.two.weight, module.two.bias))
    return torch.cat(found, 2) + found[0].mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("add", "ndim", "merged"),
    [
        (residual_first, 2, 1),
        (residual_second, 2, 1),
        (residual_of_a_shortcut, 2, 1),
        (residual_first, 3, 1),
        (residual_second, 3, 1),
        (residual_of_chunks, 3, 2),
    ],
)
@pytest.mark.usefixtures("always")
def test_a_convolution_adds_to_the_residual(
    add: Callable[[Any, Tensor], Tensor], ndim: int, merged: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = seeded(lambda: Residual(add, ndim), dtype), picture(2, 4, *(4, 13, 11)[-ndim:]).to(dtype)
    programs = check(module, x, atol=2e-5 if dtype == torch.float32 else 1e-12)
    for program in programs:
        nodes = [node for node in program.nodes() if node.target is windows.residual_convolution]
        assert len(nodes) == program.changes["residuals"] == merged
        assert all(root(node) is node.args[0] for node in nodes)
        assert not any(node.target in (aten.add.Tensor, aten.add_.Tensor) for node in program.nodes()) or merged == 2
    if merged == 2:
        assert ["keep" in node.kwargs for node in nodes] == [True, False]
    monkeypatch.setenv("HALOVAE_PASSES", ",".join(passes.PASSES.keys() - {"residuals"}))
    for program, before in zip(programs, check(module, x, atol=2e-5), strict=True):
        assert program.flops == before.flops
        assert program.peak <= before.peak


def residual_of_another_size(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return x[:, :1] + module.inner(x)


def residual_that_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return (x + module.inner(x)) * x


def residual_whose_view_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    view = x.transpose(2, 3)
    return (x + module.inner(x)) * view.mean()


def residual_that_is_expanded(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)[:, :1].expand(-1, 4, -1, -1)
    return x + module.inner(x)


def residual_that_is_convolved(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    found: Tensor = x + module.two(x)
    return found


def convolution_that_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    inner = module.inner(x)
    return (x + inner) * inner


def sum_of_a_multiple(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return torch.add(x, module.inner(x), alpha=2)


def input_that_is_written_before_the_sum(module: Any, x: Tensor) -> Tensor:
    residual, y = module.one(x), module.first(x)
    inner = module.two(y)
    gate = F.silu(y)
    found: Tensor = (residual + inner) * gate
    return found


def input_that_is_convolved_before_the_sum(module: Any, x: Tensor) -> Tensor:
    residual, y = module.first(2 * x), module.first(x)
    inner = module.one(F.silu(y))
    gate = module.two(F.silu(y)).sigmoid()
    found: Tensor = (residual + inner) * gate
    return found


def residual_that_is_the_input(module: Any, x: Tensor) -> Tensor:
    return x + module.inner(x)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "add",
    [
        residual_of_another_size,
        residual_that_is_used_later,
        residual_whose_view_is_used_later,
        residual_that_is_expanded,
        residual_that_is_convolved,
        convolution_that_is_used_later,
        input_that_is_written_before_the_sum,
        input_that_is_convolved_before_the_sum,
        sum_of_a_multiple,
        residual_that_is_the_input,
    ],
)
def test_a_convolution_does_not_add_to_maps_in_use(add: Callable[[Any, Tensor], Tensor]) -> None:
    x = picture(1, 4, 13, 11).float()
    before = x.clone()
    for program in check(seeded(lambda: Residual(add), torch.float32), x, GRIDS[:4], atol=2e-5):
        assert windows.residual_convolution not in targets(program)
    assert torch.equal(x, before)


def residual_that_is_returned(module: Any, x: Tensor) -> Any:
    x = module.first(x)
    return x + module.inner(x), x[:, :1]


class Called(nn.Module):
    """Calls a submodule for each frame."""

    def __init__(self, add: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.decoder = Residual(add, 3)

    def forward(self, z: Tensor) -> Tensor:
        found = []
        for frame in torch.split(z, 1, 2):
            larger = F.silu(frame * 2)
            result = self.decoder(larger)
            found.append(F.silu(larger) + (result if isinstance(result, Tensor) else result[0] * result[1]))
        return torch.cat(found, 2)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("add", "merged"),
    [(residual_first, True), (residual_that_is_the_input, False), (residual_that_is_returned, False)],
)
def test_a_called_graph_does_not_add_to_maps_of_its_caller(add: Callable[[Any, Tensor], Any], merged: bool) -> None:
    x = picture(1, 4, 5, 6, 7).float()
    for program in check(seeded(lambda: Called(add), torch.float32), x, atol=2e-5):
        assert program.bodies
        assert (windows.residual_convolution in targets(program)) is merged


def test_on_accelerators_sums_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOVAE_PASSES", ",".join(passes.PASSES.keys() - {"residuals"}))
    ((_, program, mesh),) = recorded(seeded(lambda: Residual(residual_first)), picture(1, 4, 8, 7), Grid())
    monkeypatch.setattr(Device, "kind", "cuda")
    assert residuals.run(program.graph, mesh) == 0
    monkeypatch.setattr(Device, "kind", "cpu")
    assert residuals.run(program.graph, mesh) == 1


def test_the_one_of_two_maps_without_gaps_is_overwritten() -> None:
    for program in check(seeded(Gated), picture(2, 4, 13, 11)):
        (product,) = (node for node in program.nodes() if node.target is aten.mul_.Tensor)
        assert [factor.target for factor in product.all_input_nodes] == [aten.silu.default, aten.slice.Tensor]


def test_a_term_with_a_factor_stays_second() -> None:
    class Weighted(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner, gate = self.linear(x.movedim(1, -1)).movedim(-1, 1).chunk(2, 1)
            return self.after(torch.add(inner, F.silu(gate), alpha=2))

    check(seeded(Weighted), picture(2, 4, 13, 11))
