"""Strips: a plane that one device computes part by part, compared with the plain module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import halovae
from halovae import Grid
from halovae.device.memory import LiveBytes
from halovae.distributed.mesh import Mesh
from halovae.distributed.sequence import SequenceTransport, in_sequence
from halovae.distributed.transport import Transport
from halovae.errors import MemoryBudgetError
from halovae.models import zoo
from halovae.models.architectures import random_vae
from halovae.models.zoo import CALLS
from halovae.plane import group_norms, lines, strips, whole_maps
from halovae.plane.hooks import untouched
from halovae.plane.layout import MeshDim
from halovae.plane.live import peak
from halovae.plane.program import Program
from halovae.plane.strip_program import InStrips, StripProgram, record_strips
from halovae.plane.strips import NarrowStripError, Strips
from halovae.plane.trace import trace

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
# Families whose peak falls, each with the shape of its latents.
STRIPPED: dict[str, tuple[int, ...]] = {
    "AutoencoderTiny": (1, 4, 36, 28),
    "AutoencoderDC (conv)": (1, 4, 36, 28),
    "AutoencoderDC (pixel shuffle)": (1, 4, 36, 28),
    "AutoencoderKLHunyuanImageRefiner": (1, 4, 3, 36, 28),
    "AutoencoderKLQwenImage": (1, 4, 1, 36, 28),
    "AutoencoderKLWan (2.1)": (1, 4, 3, 36, 28),
    "AutoencoderKLWan (2.2)": (1, 12, 3, 36, 28),
}
# Families that normalize over the whole plane up to the end: strips wait for each other.
WAITING = ("AutoencoderKL", "AutoencoderKLFlux2", "AsymmetricAutoencoderKL", "VQModel", "AutoencoderKLHunyuanVideo")
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=400, derandomize=False, print_blob=True)


def recorded(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, how: InStrips) -> StripProgram:
    def record(mesh: Mesh, layout: Strips, passes: Any) -> Any:
        return trace(call, [module], mesh, x.shape, x.dtype, CPU, passes=passes, strips=layout)

    return record_strips(record, CPU, x.shape[how.dim], how)


def run(program: StripProgram, x: Tensor) -> Tensor:
    with torch.no_grad():
        return program(x, Mesh(Grid(), CPU))


def compared(
    name: str, how: InStrips, sizes: tuple[int, ...], direction: zoo.Direction = "decode"
) -> tuple[StripProgram, Program]:
    """Compare strips with the plain module. Return their program, and that of a call at once."""
    entry = ENTRIES[name]
    module, call = zoo.build(entry, torch.float64), CALLS[direction]
    x = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), untouched(module):
        expected = call(module, x)
    found = recorded(lambda z: call(module, z), module, x, how)
    atol = entry.bound * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(run(found, x), expected, rtol=0, atol=atol)
    return found, trace(lambda z: call(module, z), [module], Mesh(Grid(), CPU), x.shape, x.dtype, CPU)


def check(name: str, how: InStrips, shape: tuple[int, ...] | None = None) -> None:
    sizes = shape or (*(ENTRIES[name].shape("decode") or ())[:-2], *STRIPPED[name][-2:])
    found, whole = compared(name, how, sizes)
    assert found.peak < whole.peak
    if how.count == 3:  # narrow strips repeat more of an upsampling at their borders
        assert sum(times * program.flops for program, times in found.graphs) <= 1.08 * whole.flops


@pytest.mark.parametrize("name", STRIPPED)
def test_a_family_decodes_exactly_in_three_strips_of_rows(name: str) -> None:
    check(name, InStrips(3, "rows"))


@pytest.mark.parametrize("how", [InStrips(2, "cols"), InStrips(6, "rows"), InStrips(9, "rows")], ids=str)
@pytest.mark.parametrize("name", STRIPPED)
def test_a_family_decodes_exactly_in_other_strips(name: str, how: InStrips) -> None:
    check(name, how)


@pytest.mark.parametrize("how", [InStrips(3, "cols"), InStrips(5, "cols"), InStrips(30, "cols")], ids=str)
@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderKLWan (2.1)", "AutoencoderKLWan (2.2)"])
def test_the_last_strip_of_an_encode_computes_what_needs_all_cols(name: str, how: InStrips) -> None:
    *sizes, height, width = ENTRIES[name].shape("encode") or ()
    found, whole = compared(name, how, (*sizes, 2 * height, 6 * width), "encode")
    assert not found.waits
    assert found.peak < whole.peak * (0.75 if how.count == 3 else 0.6)
    flops = sum(times * program.flops for program, times in found.graphs)
    assert flops <= (1.01 if how.count == 3 else 1.1) * whole.flops


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6, 9])
def test_clips_of_any_length(frames: int) -> None:
    channels = (ENTRIES["AutoencoderKLWan (2.1)"].shape("decode") or ())[1]
    check("AutoencoderKLWan (2.1)", InStrips(4, "cols"), (1, channels, frames, 25, 29))


@pytest.mark.parametrize("how", [InStrips(3, "rows"), InStrips(3, "rows", True), InStrips(4, "cols", True)], ids=str)
@pytest.mark.parametrize("name", WAITING)
def test_a_family_with_norms_over_the_plane_decodes_exactly_in_strips(name: str, how: InStrips) -> None:
    sizes = (ENTRIES[name].shape("decode") or ())[:-2]
    found, whole = compared(name, how, (*sizes, 36, 28))
    computed = sum(times * program.flops for program, times in found.graphs) / whole.flops
    assert computed <= (1.6 if how.recompute else 1.08)


class Normalized(nn.Module):
    """Residual blocks with GroupNorm after an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(7))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        for at in range(0, 6, 2):
            h = self.convs[at + 1](F.silu(self.norms[at](x)))
            x = x + self.convs[at + 2](F.silu(self.norms[at + 1](h)))
        return x


class Beyond(nn.Module):
    """A convolution that reads zeros beyond the last row, cheap enough to be computed again."""

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 32)
        self.cheap = nn.Conv2d(2, 32, kernel, stride=stride, padding=padding)
        self.last = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cheap(self.first(x))
        return self.last(self.norm(x) + x.sin())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 2, 2), (3, 2, 1), (4, 1, 2), (2, 1, 1), (3, 1, 2)])
def test_rows_beyond_the_plane_are_not_computed_again(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    module, x = Beyond(kernel, stride, padding).double(), torch.randn(1, 2, 65, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
    found = recorded(module, module, x, InStrips(3, "rows", True))
    torch.testing.assert_close(run(found, x), expected, rtol=0, atol=1e-12)


def test_strips_that_share_no_work_are_refused() -> None:
    class Centered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean((2, 3), keepdim=True)

    module, x = Centered(), torch.randn(1, 3, 32, 8, dtype=torch.float64)
    try:
        found = recorded(module, module, x, InStrips(4, "rows"))
    except NarrowStripError:
        return
    assert any(node.target is group_norms.gather for node in found.nodes())  # each has its own rows


def test_maps_are_computed_again_where_strips_wait() -> None:
    torch.manual_seed(0)
    module, x = Normalized().double(), torch.randn(1, 8, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
    kept, again = (recorded(module, module, x, InStrips(4, "rows", recompute)) for recompute in (False, True))
    measured = []
    for program in (kept, again):
        with LiveBytes() as live:
            result = run(program, x)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        measured.append(live.peak - result.nbytes)
        assert measured[-1] <= program.peak
    waiting = [
        sum(times * peak(one.graph, one.bodies, before=strips.waits) for one, times in program.graphs)
        for program in (kept, again)
    ]
    largest = expected.nbytes
    assert waiting[0] > 1.9 * largest  # a block's input and the map between its convolutions
    assert waiting[1] < 1.1 * largest  # its input
    assert measured[1] < 0.9 * measured[0]


def test_a_program_of_strips_between_the_first_and_the_last_serves_all_of_them() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3, padding=1))
    found = recorded(module, module.double(), torch.randn(1, 2, 40, 6, dtype=torch.float64), InStrips(8, "rows"))
    assert len(found.programs) == 3


class Stack(nn.Module):
    """Layers of all kinds, with a sum around each."""

    def __init__(self, layers: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.layers = layers
        self.convs = nn.ModuleList(
            nn.Conv2d(3, 3, (k, 3), padding=((k - 1) * d // 2, 1), dilation=(d, 1), padding_mode=mode)
            for kind, k, d, mode in layers if kind == "conv"
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        convs = iter(self.convs)
        for kind, count, *_ in self.layers:
            if kind == "conv":
                x = x + next(convs)(F.silu(x))
            elif kind == "up":
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            elif kind == "norm":
                x = F.normalize(x, dim=1) * 2
            elif kind == "pool":
                x = F.avg_pool2d(x, 2) if x.shape[-2] % 2 == 0 else x
            elif kind == "group":
                x = F.group_norm(x, count) + x
            elif kind == "smooth":
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
            else:
                x = x - x.mean((2, 3), keepdim=True)
        return x


LAYER = st.one_of(
    st.tuples(
        st.just("conv"), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]),
        st.sampled_from(["zeros", "reflect", "replicate"]),
    ),
    st.tuples(
        st.sampled_from(["up", "norm", "norm", "pool", "smooth", "mean"]), st.just(0), st.just(0), st.just("")
    ),
    st.tuples(st.just("group"), st.sampled_from([1, 3]), st.just(0), st.just("")),
)  # fmt: skip


def drawn(data: st.DataObject) -> None:
    layers = data.draw(st.lists(LAYER, min_size=1, max_size=7))
    if sum(kind in ("up", "smooth") for kind, *_ in layers) > 2:
        return
    mesh_dims: tuple[MeshDim, ...] = "rows", "cols"
    count, mesh_dim = data.draw(st.integers(2, 24)), data.draw(st.sampled_from(mesh_dims))
    size = data.draw(st.integers(16, 40))
    module = Stack(layers).double()
    x = torch.randn(1, 3, size, size + data.draw(st.integers(-3, 3)), dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
    how = InStrips(count, mesh_dim, data.draw(st.booleans()))
    try:
        found = recorded(module, module, x, how)
    except NarrowStripError:
        return
    torch.testing.assert_close(run(found, x), expected, rtol=0, atol=1e-11)


class Attention(nn.Module):
    """Attention of all cells, with a sum around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        found = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.out(found)


@settings(QUICK, max_examples=40)
@given(
    st.lists(st.sampled_from(["conv", "reflect", "down", "behind", "pool"]), min_size=3, max_size=6),
    st.integers(16, 48), st.integers(16, 48), st.integers(2, 20),
)  # fmt: skip
def test_any_encoder_with_attention_at_its_end(kinds: list[str], height: int, width: int, count: int) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for kind in (*kinds, "down", "down"):
        if kind == "pool":
            layers.append(nn.AvgPool2d(2))
        elif kind == "behind":
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 16, 3, 2)]
        else:
            stride = 2 if kind == "down" else 1
            layers.append(nn.Conv2d(16, 16, 3, stride, 1, padding_mode="reflect" if kind == "reflect" else "zeros"))
    module = nn.Sequential(*layers, Attention(16), nn.Conv2d(16, 4, 3, padding=1)).double().eval().requires_grad_(False)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    try:
        expected = module(x)
    except RuntimeError:
        return  # nothing is left of so small a map
    try:
        found = recorded(module, module, x, InStrips(count, "rows"))
    except NarrowStripError:
        return
    torch.testing.assert_close(run(found, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@QUICK
@given(st.data())
def test_any_layers(data: st.DataObject) -> None:
    drawn(data)


@LONG
@given(st.data())
def test_any_layers_at_length(data: st.DataObject) -> None:
    drawn(data)


class Deep(nn.Module):
    """Residual blocks with norms over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.silu(F.normalize(x, dim=1)))
        return x


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Deep().double(), torch.randn(1, 4, 24, 10, dtype=torch.float64)


def test_one_line_serves_a_convolution_and_the_sum_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = deep()
    early = recorded(module, module, x, InStrips(3, "rows"))
    monkeypatch.setattr("halovae.plane.strip_graphs.carry_early", lambda *_: None)
    late = recorded(module, module, x, InStrips(3, "rows"))
    assert early.programs[1].bytes_sent < 0.7 * late.programs[1].bytes_sent
    torch.testing.assert_close(run(early, x), run(late, x), rtol=0, atol=1e-12)


def test_frames_that_are_kept_for_the_next_chunk_carry_their_lines_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = random_vae("wan2.1", 4)

    def sent() -> int:
        x = torch.empty(1, 16, 4, 30, 4)
        program = recorded(lambda z: CALLS["decode"](vae, z), vae, x, InStrips(3, "rows"))
        return program.programs[1].bytes_sent

    early = sent()
    monkeypatch.setattr(lines._Lines, "_is_known", lambda *_: False)
    assert early < 0.8 * sent()


def test_lines_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = deep()
    found, expected = recorded(module, module, x, InStrips(3, "rows")), module(x)
    start = SequenceTransport.start
    monkeypatch.setattr(
        SequenceTransport, "start",
        lambda own, scope, sends, receives: start(own, scope, [(p, torch.zeros_like(t)) for p, t in sends], receives),
    )  # fmt: skip
    assert (run(found, x) - expected).abs().max() > 1e-3


def test_what_a_strip_raises_ends_all_of_them() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 1:
            raise ArithmeticError("strip 1")
        mesh.transport.all_values("here")

    with pytest.raises(ArithmeticError, match="strip 1"):
        in_sequence(Grid(rows=3), CPU, work)


def test_strips_that_wait_for_each_other_are_an_error() -> None:
    def work(mesh: Mesh) -> None:
        mesh.transport.start("rows", [], [(1 - mesh.rank, torch.empty(1))])()

    with pytest.raises(RuntimeError, match=r"strips \[0, 1\] wait for each other"):
        in_sequence(Grid(rows=2), CPU, work)


@pytest.mark.parametrize("size", [12, 14])  # the last strips have the last row, or two
def test_as_many_strips_as_rows_are_equal_ones_and_more_are_as_many(size: int) -> None:
    module = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode) for mode in ("zeros", "reflect") * 2])
    module = module.double().eval().requires_grad_(False)
    x = torch.randn(1, 2, size, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for count in (size // 2, size, 2 * size, 5 * size):
        program = recorded(module, module, x, InStrips(count, "rows"))
        assert program.strips.count <= min(count, size + 4)  # each convolution lags by a row
        assert count < size + 4 or program.strips.count == size + 4
        torch.testing.assert_close(program(x, Mesh(Grid(), CPU)), module(x), rtol=0, atol=1e-12)


def test_a_decode_within_a_budget_takes_strips_and_no_more_than_predicted(tmp_path: Any) -> None:
    random_vae("wan2.1", 8).save_pretrained(tmp_path)
    vae = halovae.load(tmp_path)
    x = torch.randn(1, 16, 3, 40, 12, generator=torch.Generator().manual_seed(0))
    vae.warmup(x.shape)
    with LiveBytes() as alone:
        expected = vae.decode(x)
    assert expected is not None
    kept = expected.nbytes
    budget = kept + int(0.62 * (alone.peak - kept))
    with LiveBytes() as within:
        found = vae.decode(x, memory_budget=budget)
    decision = vae.plan(x.shape, memory_budget=budget)
    assert decision is not None
    assert decision.chosen.strips is not None
    assert decision.chosen.strips.mesh_dim == "rows"
    assert within.peak - kept <= (decision.chosen.peak or 0) * 1.02 <= budget
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with pytest.raises(MemoryBudgetError, match=r"the leanest way \(1x1 in .* strips of rows\) takes"):
        vae.decode(x, memory_budget=kept + alone.peak // 20)


def test_uint8_pictures_of_strips_are_converted_one_by_one() -> None:
    module, x = deep()
    found = recorded(module, module, x, InStrips(3, "rows"))
    shapes = list[tuple[int, ...]]()

    def convert(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape))
        return part.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

    with torch.no_grad():
        result = found(x, Mesh(Grid(), CPU), convert=convert)
    assert result.dtype == torch.uint8
    assert len(shapes) == 3
    assert sum(shape[2] for shape in shapes) == 24


def test_the_submodules_before_the_last_one_that_waits_are_found() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention, self.later = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
            self.norm = nn.GroupNorm(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.later(self.norm(self.first(x)))

    module, x = Model(), torch.empty(1, 2, 12, 8)
    mesh_dim: MeshDim = "rows"

    class Place(Transport):
        rank, world = 0, 2

    mesh = Mesh(Grid(rows=2), CPU, Place())
    layout = Strips(mesh_dim, (0, 11, 12))
    program = trace(module, [module], mesh, x.shape, x.dtype, CPU, passes=(), strips=layout)
    before, last = strips.where_whole(program)
    assert {"first", "norm"} <= before
    assert "later" not in before
    assert last == {"norm"}


def test_a_single_device_with_too_little_free_memory_decodes_in_strips(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_vae("wan2.1", 4).save_pretrained(tmp_path)
    vae = halovae.load(tmp_path)
    x = torch.randn(1, 16, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(x)
    assert expected is not None
    whole = vae.plan(x.shape, memory_budget=2**40)
    assert whole is not None
    free = int((0.8 * (whole.chosen.peak or 0) * 1.15 + expected.nbytes) / 0.9)
    monkeypatch.setattr("halovae.device.kinds.Device.memory", lambda own: (free, free))
    counts = list[int]()

    def counted(grid: Grid, *others: Any) -> None:
        counts.append(grid.size)
        in_sequence(grid, *others)

    monkeypatch.setattr("halovae.plane.strip_program.in_sequence", counted)
    found = vae.decode(x)
    assert counts[0] > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_function_that_draws_random_numbers_is_not_cut() -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    module = Noisy(2, 2, 3, padding=1)
    with pytest.raises(NarrowStripError, match="random"):
        recorded(module, module, torch.empty(1, 2, 12, 9), InStrips(2, "rows"))


def test_a_function_that_writes_to_its_input_leaves_the_callers_and_the_next_strips() -> None:
    class Written(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    module, x = Written(2, 2, 3, padding=1).double(), torch.randn(1, 2, 12, 9, dtype=torch.float64)
    expected = module(x.clone()).detach()
    torch.testing.assert_close(run(recorded(module, module, x, InStrips(3, "rows")), x), expected, rtol=0, atol=1e-12)


def test_a_whole_map_is_waited_for() -> None:
    found = list[float]()

    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            mesh.transport.start("rows", [], [(1, torch.empty(1))])()
            mesh.transport.hand(0, torch.ones(1))
        else:
            mesh.transport.start("rows", [(0, torch.zeros(1))], [])
            found.append(mesh.transport.handed(0, lambda: torch.empty(1)).item())

    in_sequence(Grid(rows=2), CPU, work)
    assert found == [1.0]


class Attending(nn.Module):
    """A map that is whole up to a norm over all of it, and read in several ways after that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.early, self.late, self.end = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norm = nn.Sequential(nn.SiLU(), nn.GroupNorm(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "position":
            return self.end(h) + torch.linspace(-1, 1, x.shape[-2], dtype=x.dtype).view(1, 1, -1, 1)
        early = self.early(h)
        y = self.norm(h)
        if self.how == "written":
            h.mul_(2)
        return self.end(y) + early + self.late(h)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("how", ["position", "kept", "written"])
def test_strips_see_the_same_constants_and_whole_maps(how: str, count: int) -> None:
    torch.manual_seed(0)
    module, x = Attending(how).double(), torch.randn(2, 4, 40, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
    found = recorded(module, module, x, InStrips(count, "rows"))
    if how == "written":  # a copy of a whole map would not see what is written to the map
        assert not any(node.target is whole_maps.hand for node in found.nodes())
    torch.testing.assert_close(run(found, x), expected, rtol=0, atol=1e-12)


class Gated(nn.Module):
    """Multiplies a map by what the last strip would collect for it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*[nn.Conv2d(3 if not at else 16, 16, 3, 2, 1) for at in range(3)])
        self.gate = Gate(16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.out(x * self.gate(x))


class Gate(nn.Module):
    """One value for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))


class Banded(nn.Module):
    """Uses a constant of which only strips in the middle have values."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[-2], device=x.device)
        return x * (rows - x.shape[-2] // 2).abs().lt(3).view(-1, 1)


class Pooled(nn.Module):
    """Pools with an odd window."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1)


class Resampled(nn.Module):
    """Resamples by a fraction, so that strips own unequal numbers of rows, or by so little that nothing changes."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.factor)


@pytest.mark.parametrize("count", [2, 4, 7, 16])
@pytest.mark.parametrize(
    "last",
    [
        Gated(),
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Gate(8)),
        Banded(),
        Pooled(),
        Resampled(1.25),
        Resampled(1.01),
    ],
    ids=["gated", "gate", "banded", "pooled", "resampled", "copied"],
)
def test_strips_equal_one_call_or_are_refused(last: nn.Module, count: int) -> None:
    module = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], last)
    module = module.double().eval().requires_grad_(False)
    x = torch.randn(1, 3, 64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        found = recorded(module, module, x, InStrips(count, "rows"))
    except NarrowStripError:
        assert not isinstance(last, Banded | Pooled)  # these can be cut
        return
    torch.testing.assert_close(run(found, x), module(x), rtol=0, atol=1e-12)


def test_a_map_that_two_strips_wait_for_is_kept_for_both() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            mesh.transport.start("rows", [], [(3, own := torch.empty(1))])()
            mesh.transport.hand(0, own)
        elif mesh.rank == 3:
            mesh.transport.start("rows", [(0, torch.ones(1))], [])()
            mesh.transport.handed(0, lambda: torch.empty(1))
        else:
            assert mesh.transport.handed(0, lambda: torch.empty(1)) == 1

    in_sequence(Grid(rows=4), CPU, work)
