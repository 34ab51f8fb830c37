"""Recording and replaying: what a graph holds, and what it must not hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.errors import TraceError
from halovae.grid import Grid
from halovae.models import zoo
from halovae.plane import Plane, group_norms, operators, windows
from halovae.plane.program import Program
from halovae.plane.trace import trace

CPU = torch.device("cpu")
GRIDS = (Grid(), Grid(rows=2), Grid(rows=2, cols=2))


def recorded(
    function: Callable[[Tensor], Tensor], x: Tensor, grid: Grid, *modules: nn.Module, before: Any = None
) -> list[tuple[Tensor, Program, Mesh]]:
    """Record and replay on each rank; `before` is called in between."""

    def rank(mesh: Mesh) -> tuple[Tensor, Program, Mesh]:
        program = trace(function, modules, mesh, x.shape, x.dtype, CPU)
        if before is not None:
            before()
        plane = Plane(mesh)
        with plane.active():
            local = program(plane.scatter(x).local, mesh)
            sent = mesh.traffic.messages, mesh.traffic.bytes
            full = plane.full(plane.wrap(local, program.returns))
        mesh.traffic.messages, mesh.traffic.bytes = sent
        return full, program, mesh

    return on_threads(grid, CPU, rank)


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def check(function: Callable[[Tensor], Tensor], x: Tensor, *modules: nn.Module) -> list[Program]:
    programs = []
    with torch.no_grad():
        expected = function(x.clone())
    for grid in GRIDS:
        for full, program, _ in recorded(function, x, grid, *modules):
            torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)
            programs.append(program)
    return programs


def names(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_masks_and_positions_are_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        width = x.shape[-1]
        mask = torch.full((width, width), float("-inf"), dtype=x.dtype, device=x.device)
        for index in range(width):
            mask[index, : index + 1] = 0
        mask = mask.masked_fill(torch.arange(width)[:, None] > width - 2, 0.5)
        return torch.softmax(x @ x.transpose(-1, -2) + mask.exp()[0], -1)

    for program in check(function, picture(1, 3, 6, 6)):
        assert not any("fill" in name or "arange" in name or "copy_" in name for name in names(program))


def test_a_constant_is_what_it_was_when_it_was_used() -> None:
    def function(x: Tensor) -> Tensor:
        weight = torch.ones(4, dtype=x.dtype)
        first = x * weight
        weight[0] = 5
        return first + x * weight

    check(function, picture(1, 2, 5, 4))


def test_buffers_are_written_on_each_replay() -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        out[:, :1] = x[:, :1]
        out[:, 1:] = x[:, 1:] * 2
        out.add_(1)
        return out

    x = picture(1, 3, 6, 5)
    ((_, program, mesh),) = recorded(function, x, Grid())
    for scale in (1, 2):  # nothing is left of the first run
        assert torch.equal(program(x * scale, mesh), function(x * scale))
    check(function, x)


class Activated(nn.Module):
    """A convolution whose result an activation overwrites, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.conv(x))
        h += x
        out = torch.zeros_like(h)
        out[:, :, 0 : h.shape[2]] = h.flip(1)
        return self.act(out)


def test_operators_that_write_are_recorded_as_ones_that_make_new_tensors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(Activated(), Activated()).double()
    for program in check(lambda x: module(module(x)), picture(1, 3, 6, 5), module):
        assert program.changes  # no pass runs over a graph that writes


def test_an_input_that_is_written_to_stays_as_it_is() -> None:
    x = picture(1, 3, 6, 5)
    before = x.clone()
    ((full, program, _),) = recorded(lambda z: z.mul_(2) + z, x, Grid())
    assert not program.writes
    assert torch.equal(x, before)
    torch.testing.assert_close(full, 4 * x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1).relu_() * 2,
        lambda x: _both(x.exp(), lambda y: y[:, :1], lambda y: y.neg_()),  # a view from before sees it
        lambda x: _both(x.exp(), lambda y: y[:, :1], lambda y: y[:, 1:].neg_()),
        lambda x: _both(x.exp(), lambda y: y.transpose(1, 1), lambda y: y.neg_()),
        lambda x: _both(x.exp(), lambda y: y, lambda y: y.copy_(x[:, :1])),  # it is broadcast
        lambda x: _both(x.exp(), lambda y: y, lambda y: y.clamp_(0.5, 2).masked_fill_(x > 0, 0)),
        lambda x: _both(x.exp(), lambda y: y, lambda y: y.add_(x.float())),  # the dtype stays
        lambda x: _both(x.exp().float(), lambda y: y, lambda y: y.add_(x)).double(),
    ],
)  # fmt: skip
def test_what_is_read_after_a_write_is_what_was_written(function: Callable[[Tensor], Tensor]) -> None:
    check(function, picture(1, 3, 6, 5))


def _both(x: Tensor, view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Tensor:
    seen = view(x)
    write(x)
    return x.sum(1, keepdim=True) + seen.sum(1, keepdim=True)


def test_weights_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = nn.Conv2d(3, 3, 3, padding=1).double().requires_grad_(False)
        scale = torch.full((3, 1, 1), 2.0)
    module.scale = scale
    x = picture(1, 3, 6, 5)
    with torch.inference_mode():
        ((full, _, _),) = recorded(lambda z: module(z) * module.scale.to(z), x, Grid(), module)
        torch.testing.assert_close(full, module(x) * 2)


def test_writing_to_a_tensor_of_others_is_refused() -> None:
    total = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(TraceError, match="writes to a tensor that is not of this call"):
        recorded(lambda x: x + total.add_(1), picture(1, 1, 4, 3), Grid())


def test_values_that_depend_on_the_input_end_the_recording_with_the_place() -> None:
    def function(x: Tensor) -> Tensor:
        return x * x.amax().item()

    with pytest.raises(TraceError, match=r"test_trace\.py:\d+ \(return x \* x\.amax\(\)\.item\(\)\)"):
        recorded(function, picture(1, 1, 4, 4), Grid(rows=2))


def test_values_that_do_not_may_be_read() -> None:
    def function(x: Tensor) -> Tensor:
        steps = torch.arange(5, device=x.device)
        index = int((steps == 3).nonzero().item())
        return x * index if bool((steps > 2).any()) else x

    check(function, picture(1, 1, 4, 4))


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderDC (conv)"])
def test_messages_and_bytes_are_those_recorded(name: str) -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == name)
    module = zoo.build(entry, torch.float64)
    assert entry.latents is not None
    found = recorded(lambda z: zoo.decode(module, z), picture(*entry.latents), Grid(rows=2, cols=2), module)
    for _, program, mesh in found:
        assert (program.messages, program.bytes_sent) == (mesh.traffic.messages, mesh.traffic.bytes)
        assert program.messages > 0


def relay(module: nn.Module, layout: torch.memory_format) -> None:
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)


def test_weights_may_be_laid_out_differently_later() -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == "AutoencoderKL")
    module, plain = zoo.build(entry, torch.float64), zoo.build(entry, torch.float64)
    assert entry.latents is not None
    x = picture(*entry.latents)
    with torch.no_grad():
        expected = zoo.decode(plain, x)
    for grid in GRIDS:
        relay(module, torch.contiguous_format)
        relaid = recorded(
            lambda z: zoo.decode(module, z),
            x,
            grid,
            module,
            before=lambda: relay(module, torch.channels_last),
        )
        for full, _, _ in relaid:
            torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)


def test_a_rank_that_wants_nothing_still_sends() -> None:
    """A rank that receives nothing in a fetch must still take part: other ranks wait for its messages."""

    def function(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 3:], x[:, :, :3]], 2)

    check(function, picture(1, 2, 7, 5))


def test_nothing_is_left_on_the_module() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: Tensor | None = None
            self.all: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.last = x * 2
            self.all.append(self.last)
            return self.last + 1

    module = Caching()
    check(lambda x: module(x), picture(1, 1, 4, 4), module)
    trace(lambda x: module(x), [module], Mesh(Grid(), CPU), (1, 1, 4, 4), torch.float64, CPU)
    assert module.last is None or type(module.last) is Tensor


def test_regions_of_a_profile_are_the_submodules() -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == "AutoencoderKL")
    module = zoo.build(entry)
    assert entry.latents is not None
    mesh, x = Mesh(Grid(), CPU), torch.randn(entry.latents)
    program = trace(lambda z: zoo.decode(module, z), [module], mesh, x.shape, x.dtype, CPU)
    with torch.profiler.profile() as profile:
        profiled = program(x, mesh)
    assert torch.equal(profiled, program(x, mesh))
    assert "halovae/decoder.up_blocks.1.resnets.0.conv1" in {event.name for event in profile.events()}


def test_the_peak_falls_with_the_ranks() -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == "AutoencoderKL")
    module = zoo.build(entry)
    peaks = [
        max(
            trace(lambda z: zoo.decode(module, z), [module], mesh, (1, 4, 64, 64), torch.float32, CPU).peak
            for mesh in on_threads(grid, CPU, lambda mesh: mesh)
        )
        for grid in (Grid(), Grid(rows=2), Grid(rows=2, cols=2))
    ]
    assert peaks[1] < 0.55 * peaks[0]
    assert peaks[2] < 0.30 * peaks[0]


def test_a_graph_between_ranks_holds_no_other_operators() -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == "AutoencoderKL")
    module = zoo.build(entry)
    assert entry.latents is not None
    mesh = on_threads(Grid(rows=2), CPU, lambda mesh: mesh)[0]
    program = trace(lambda z: zoo.decode(module, z), [module], mesh, entry.latents, torch.float32, CPU)
    ours = {*operators.BETWEEN_RANKS, *windows.OPERATORS, group_norms.whole_group_norm, operators.attention}
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert node.target in ours or node.target is operator.getitem or hasattr(node.target, "_schema")
