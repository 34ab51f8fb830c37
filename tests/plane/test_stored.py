"""Recorded graphs on disk: what is read equals what was traced, and what could differ is traced again."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halovae
from halovae.bench import zoo
from halovae.geometry import Grid
from halovae.mesh import Mesh
from halovae.plane import Plane, Sharded, fingerprint, sharded, stored
from halovae.plane.program import Program
from halovae.simulate import on_threads

CPU = torch.device("cpu")
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
FIELDS = (
    "peak", "flops", "messages", "bytes_sent", "starts", "streams", "chunked", "takes", "returns", "dtype", "random",
    "writes", "fallbacks", "gathered", "received", "computed", "coordinates",
)  # fmt: skip
Traces = list[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where graphs are kept. The plane's files may be edited while tests run."""
    monkeypatch.setenv("HALOVAE_CACHE", str(tmp_path))
    monkeypatch.delenv("HALOVAE_GRAPHS")
    monkeypatch.setattr(fingerprint, "_file_digest", lambda path: path)
    return tmp_path / "graphs"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Grows by one with each trace."""
    found: Traces = []
    original = vars(sharded)["trace"]

    def trace(*args: Any) -> Program:
        found.append(str(args[2].grid))
        return original(*args)

    monkeypatch.setattr(sharded, "trace", trace)
    return found


def decode_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda z: zoo.decode(module, z)


def programs(name: str, grid: Grid) -> list[tuple[Program, Tensor]]:
    """Each rank's program of an entry's decode, and the whole result."""
    entry = ENTRIES[name]
    x = zoo.example(entry, "decode", torch.float32)
    module = zoo.build(entry)

    def rank(mesh: Mesh) -> tuple[Program, Tensor]:
        own = copy.deepcopy(module)
        shard = halovae.shard(decode_of(own), own)
        assert isinstance(shard, Sharded)
        with torch.no_grad():
            program = shard._program(x, [], mesh, {}, "key")
        assert isinstance(program, Program)
        plane = Plane(mesh)
        torch.manual_seed(0)
        result = program(plane.scatter(x).local, mesh)
        with plane.active():
            return program, plane.full(plane.wrap(result, program.returns))

    with torch.random.fork_rng(devices=[]):
        return on_threads(grid, CPU, rank)


def described(program: Program) -> list[Any]:
    """Nodes in words."""
    graphs = {"": program.graph, **program.bodies}
    return [
        (name, node.op, node.name, str(node.target), str(node.args), str(node.kwargs), sorted(node.meta.items()))
        for name, graph in graphs.items()
        for node in graph.nodes
    ]


@pytest.mark.parametrize("grid", [Grid(), Grid(rows=2)], ids=str)
@pytest.mark.parametrize("name", ["AutoencoderKL (no quant_conv)", "AutoencoderKLWan (2.1)", "AutoencoderDC (conv)"])
def test_what_is_read_equals_what_was_traced(name: str, grid: Grid, traces: Traces, folder: Path) -> None:
    first = programs(name, grid)
    assert len(traces) == grid.size
    assert len(list(folder.iterdir())) == grid.size
    second = programs(name, grid)
    assert len(traces) == grid.size
    for (traced, expected), (read, found) in zip(first, second, strict=True):
        assert torch.equal(found, expected)
        assert {field: getattr(read, field) for field in FIELDS} == {field: getattr(traced, field) for field in FIELDS}
        assert described(read) == described(traced)


class Small(nn.Module):
    """Reads flags, a config, a buffer and a table."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = 2.0
        self.config = {"shift": [0.5, float("inf")]}
        self.register_buffer("bias", torch.zeros(1))
        self.bias: Tensor
        self.table = torch.ones(1)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        ramp = torch.arange(x.shape[-1], dtype=x.dtype)
        y = self.conv(x) * self.scale * self.gain + self.config["shift"][0] + self.bias + self.table + ramp
        return y.clamp(max=self.config["shift"][1]) * times


def picture() -> Tensor:
    return torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(1))


def run(module: nn.Module, function: Any = None, **options: Any) -> Tensor:
    """A call in a process that has no graph."""
    found = halovae.shard(module if function is None else function, module)(picture(), options=options)
    assert found is not None
    return found


def test_weights_are_the_live_ones(traces: Traces) -> None:
    module = Small()
    run(module)
    module.conv.weight.mul_(2)
    assert torch.equal(run(module), module(picture()))
    assert len(traces) == 1


def _flag(module: Small, _: pytest.MonkeyPatch) -> None:
    module.scale = 3.0


def _config(module: Small, _: pytest.MonkeyPatch) -> None:
    module.config["shift"][0] = 0.25


def _buffer(module: Small, _: pytest.MonkeyPatch) -> None:
    module.bias.add_(1)


def _table(module: Small, _: pytest.MonkeyPatch) -> None:
    module.table = torch.zeros(1)


def _dtype_of_a_weight(module: Small, _: pytest.MonkeyPatch) -> None:
    module.conv.weight.data = module.conv.weight.data.to(memory_format=torch.channels_last)


def _class_attribute(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "gain", 2.0)


def _code(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "forward", lambda self, x, times=1: self.conv(x))


def _submodule(module: Small, _: pytest.MonkeyPatch) -> None:
    module.conv = nn.Conv2d(3, 3, 1).requires_grad_(False)


def _source(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_file_digest", lambda path: f"{path}, edited")


def _own_source(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_OWN_SOURCES", "edited")


def _version(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99")


def _variable(_: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "native")


CHANGES = (
    _flag, _config, _buffer, _table, _dtype_of_a_weight, _class_attribute, _code, _submodule, _source, _own_source,
    _version, _variable,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_key(
    change: Callable[[Small, pytest.MonkeyPatch], None], traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Small()
    run(module)
    run(Small())
    assert len(traces) == 1
    change(module, monkeypatch)
    assert torch.equal(run(module), module(picture()))
    assert len(traces) == 2
    run(module)
    assert len(traces) == 2


def test_options_shapes_and_casts_are_parts_of_the_key(traces: Traces) -> None:
    module = Small()
    for count, call in enumerate(
        (
            lambda: run(module),
            lambda: run(module, times=2),
            lambda: halovae.shard(module)(picture()[..., :3]),
            lambda: halovae.shard(module)(picture(), grid=Grid(), options={"times": 3}),
            lambda: Sharded(module, [module], 2)(picture()),
        ),
        1,
    ):
        call()
        call()
        assert len(traces) == count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(module), module(picture()))
    assert len(traces) == 6


@pytest.mark.parametrize("damage", ["cut", "a byte", "text", "another key", "a constant"])
def test_a_damaged_file_is_traced_again_and_replaced(damage: str, traces: Traces, folder: Path) -> None:
    module = Small()
    expected = run(module)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a byte":
        middle = len(content) - 200
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif damage == "text":
        path.write_text("a letter to a friend")
    elif damage == "another key":
        run(module, times=2)
        traces.pop()
        (other,) = (one for one in folder.iterdir() if one != path)
        path.write_bytes(other.read_bytes())
    elif damage == "a constant":
        import safetensors.torch

        tensors = safetensors.torch.load(content)
        name = next(one for one in tensors if one != "graph")
        tensors[name] = tensors[name] + 1
        path.write_bytes(safetensors.torch.save(tensors))
    assert torch.equal(run(module), expected)
    assert len(traces) == 2
    assert torch.equal(run(module), expected)
    assert len(traces) == 2


def test_those_go_first_that_were_not_used_for_longest(
    traces: Traces, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Small()
    paths: list[Path] = []
    for times in (1, 2, 3):
        run(module, times=times)
        (path,) = set(folder.iterdir()) - set(paths)
        os.utime(path, (1000 + times, 1000 + times))
        paths.append(path)
    run(module, times=1)  # read, and so used last
    assert paths[0].stat().st_mtime > 2000
    monkeypatch.setattr(stored, "LIMIT", sum(path.stat().st_size for path in paths[:2]) + 100)
    (folder / "notes.txt").write_text("not ours")
    run(module, times=4)
    assert [path.exists() for path in paths] == [True, False, False]
    assert (folder / "notes.txt").exists()
    assert len(traces) == 4


def _hook(module: Small) -> Any:
    module.conv.register_forward_hook(lambda _, __, out: out * 2)


def _replaced(module: Small) -> Any:
    original = module.conv.forward
    module.conv.forward = lambda x: original(x) * 2  # type: ignore[assignment, method-assign]


def _unknown(module: Small) -> Any:
    module.noise = random.Random(0)  # type: ignore[assignment]


def _closure(module: Small) -> Any:
    factor = torch.ones(1) * 2
    return lambda x: module(x) * factor


def _object(module: Small) -> Any:
    kept: list[int] = []

    def function(x: Tensor) -> Tensor:
        kept.append(1)
        return module(x)

    return function


def _other_module(module: Small) -> Any:
    other = nn.Conv2d(3, 3, 1).requires_grad_(False)
    return lambda x: other(module(x))


def _effect(module: Small) -> Any:
    count = 0

    def function(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return module(x)

    return function


def _reads_weights(module: Small) -> Any:
    def forward(x: Tensor) -> Tensor:
        return module.conv(x) * (2 if module.conv.weight.tolist()[0][0][0][0] > 0 else 3)

    return forward


UNSTABLE = (_hook, _replaced, _unknown, _closure, _object, _other_module, _effect, _reads_weights)


@pytest.mark.parametrize("make", UNSTABLE)
def test_what_is_not_known_for_sure_is_not_kept(make: Callable[[Small], Any], traces: Traces, folder: Path) -> None:
    module = Small()
    function = make(module)
    for _ in range(2):
        run(module, function)
    assert len(traces) == 2
    assert not folder.exists() or not list(folder.iterdir())


def test_large_constants_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LARGEST", 3)
    run(Small())
    assert not folder.exists()


@pytest.mark.parametrize("where", ["a file", "switched off"])
def test_without_a_folder_graphs_are_traced(
    where: str, folder: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "a file":
        folder.write_text("in the way")
    else:
        monkeypatch.setenv("HALOVAE_GRAPHS", "0")
    module = Small()
    for _ in range(2):
        assert torch.equal(run(module), module(picture()))
    assert len(traces) == 2
    assert not folder.is_dir()


def test_an_autoencoder_keeps_its_calls_and_what_they_return(traces: Traces) -> None:
    entry = ENTRIES["AutoencoderKL"]
    assert entry.latents is not None
    assert entry.pictures is not None
    z, x = torch.randn(entry.latents), torch.randn(entry.pictures)
    plain: Any = zoo.build(entry)
    with torch.no_grad():
        decoded, encoded = plain.decode(z), plain.encode(x)
    for _ in range(2):
        vae: Any = halovae.parallelize(zoo.build(entry))
        found = vae.decode(z)
        assert type(found) is type(decoded)
        torch.testing.assert_close(found.sample, decoded.sample)
        other = vae.encode(x)
        assert type(other) is type(encoded)
        torch.testing.assert_close(other.latent_dist.mean, encoded.latent_dist.mean)
    assert len(traces) == 2


SCRIPT = """
    import sys, time
    import torch
    import halovae
    from halovae.plane import fingerprint, sharded
    sys.path.insert(0, sys.argv[1])
    from model import Model

    fingerprint._OWN_SOURCES = "fixed"
    count, original = [], sharded.trace
    sharded.trace = lambda *args: (count.append(1), original(*args))[1]
    torch.manual_seed(0)
    found = halovae.shard(Model().eval().requires_grad_(False))(torch.ones(1, 3, 4, 4))
    print(len(count), float(found.sum()))
"""
MODEL = """
    from torch import nn
    from helper import factor

    class Model(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 3, padding=1)

        def forward(self, x):
            return super().forward(x) * factor()
"""


def test_other_processes_read_it_until_a_file_that_is_imported_changes(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))

    def process(factor: int) -> tuple[int, float]:
        (tmp_path / "helper.py").write_text(f"def factor():\n    return {factor}\n")
        for one in tmp_path.glob("*.py"):
            os.utime(one, (1_000_000 + factor, 1_000_000 + factor))
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
        count, total = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(count), float(total)

    first, total = process(1)
    assert (first, len(list(folder.iterdir()))) == (1, 1)
    assert process(1) == (0, total)
    count, doubled = process(2)
    assert count == 1
    assert doubled == pytest.approx(2 * total)
