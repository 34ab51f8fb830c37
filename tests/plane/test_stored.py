"""Graphs on disk: a stored graph equals the traced one, and a graph that could differ is traced again."""

from __future__ import annotations

import copy
import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halovae
from halovae.bench import on_grids
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.grid import Grid
from halovae.models import zoo
from halovae.plane import Plane, Sharded, fingerprint, sharded, stored
from halovae.plane.program import Program
from halovae.runtime.plane_call import PlaneCall

CPU = torch.device("cpu")
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
FIELDS = (
    "peak", "flops", "messages", "bytes_sent", "starts", "streams", "chunked", "takes", "returns", "dtype", "random",
    "writes", "fallbacks", "gathered", "received", "computed", "coordinates",
)  # fmt: skip
Traces = list[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The folder of stored graphs."""
    monkeypatch.setenv("HALOVAE_CACHE", str(tmp_path))
    monkeypatch.delenv("HALOVAE_GRAPHS")
    monkeypatch.setattr(fingerprint, "_OWN_SOURCES", "fixed")
    return tmp_path / "graphs"


@pytest.fixture
def traces(monkeypatch: Patch) -> Traces:
    """A list that grows by one with each trace."""
    found: Traces = []
    original = vars(sharded)["trace"]

    def trace(*args: Any) -> Program:
        found.append(str(args[2].grid))
        return original(*args)

    monkeypatch.setattr(sharded, "trace", trace)
    return found


def programs(name: str, grid: Grid) -> list[tuple[Program, Tensor]]:
    """Each rank's program of an entry's decode, and the whole result."""
    x = on_grids.example(ENTRIES[name], "decode", torch.float32)
    module = zoo.build(ENTRIES[name])

    def rank(mesh: Mesh) -> tuple[Program, Tensor]:
        call = PlaneCall(copy.deepcopy(module), "decode")
        with torch.no_grad():
            program = call._sharded._program(x, [], mesh, {"_names": ""}, "key")
        assert isinstance(program, Program)
        plane = Plane(mesh)
        result = program(plane.scatter(x).local, mesh)
        with plane.active():
            return program, plane.full(plane.wrap(result, program.returns))

    return on_threads(grid, CPU, rank)


def described(program: Program) -> list[Any]:
    """Describe nodes as text."""
    graphs = {"": program.graph, **program.bodies}
    return [
        (name, node.op, node.name, str(node.target), str(node.args), str(node.kwargs), sorted(node.meta.items()))
        for name, graph in graphs.items()
        for node in graph.nodes
    ]


@pytest.mark.parametrize(
    ("name", "grid"),
    [("AutoencoderKL", Grid()), ("AutoencoderKLWan (2.1)", Grid(rows=2)), ("AutoencoderDC (conv)", Grid(rows=2))],
)
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


def test_an_autoencoder_keeps_its_calls_and_what_they_return(traces: Traces) -> None:
    entry = ENTRIES["AutoencoderKL"]
    z, x = on_grids.example(entry, "decode", torch.float32), on_grids.example(entry, "encode", torch.float32)
    plain: Any = zoo.build(entry)
    with torch.no_grad():
        decoded, encoded = plain.decode(z), plain.encode(x)
    for _ in range(2):
        vae: Any = halovae.parallelize(zoo.build(entry))
        found, other = vae.decode(z), vae.encode(x)
        assert (type(found), type(other)) == (type(decoded), type(encoded))
        torch.testing.assert_close(found.sample, decoded.sample)
        torch.testing.assert_close(other.latent_dist.mean, encoded.latent_dist.mean)
    assert len(traces) == 2


def test_an_encoder_is_kept_beside_a_hand_written_decoder(traces: Traces) -> None:
    x = torch.linspace(-1, 1, 3 * 16 * 24).view(1, 3, 1, 16, 24)
    for _ in range(2):
        vae: Any = halovae.parallelize(zoo.build(ENTRIES["AutoencoderKLQwenImage"]))
        vae.encode(x)
    assert len(traces) == 1


def key(module: nn.Module) -> str:
    """The key of an autoencoder's decode."""
    return fingerprint.fingerprint(PlaneCall(module, "decode")._run, [module], "PlaneCall.decode", ("settings",))


SCRIPT = """
from test_stored import *

fingerprint._OWN_SOURCES = "fixed"
print("keys", *(key(zoo.build(ENTRIES[name])) for name in STABLE))
"""
STABLE = [name for name in ENTRIES if "RAE" not in name]  # modules of transformers in it hold sets of objects


def test_autoencoders_have_keys_that_hold_in_other_processes() -> None:
    found = []  # not in this process: once transformers has initialized a model, `nn.Module` has a method more
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent, env=environment
        )
        found.append(done.stdout.splitlines()[-1].split()[1:])
    assert found[0] == found[1]
    assert len(set(found[0])) == len(STABLE)


@pytest.fixture(scope="module")
def flux2() -> nn.Module:
    """It has a buffer."""
    return zoo.build(ENTRIES["AutoencoderKLFlux2"])


def other(vae: Any, patch: Patch, forward: Callable[..., Any]) -> None:
    """Another method of a class."""
    patch.setattr(type(vae.decoder), "forward", forward)


def mine(self: Any, x: Tensor) -> Tensor:
    """A method that none of the packages has."""
    return x


CHANGES: dict[str, Callable[[Any, Patch], Any]] = {
    "slicing": lambda vae, _: vae.enable_slicing(),
    "tiling": lambda vae, _: vae.enable_tiling(),
    "training": lambda vae, _: vae.train(),
    "config": lambda vae, _: vae.register_to_config(scaling_factor=2.0),
    "dtype": lambda vae, _: vae.to(torch.bfloat16),
    "a buffer's values": lambda vae, _: vae.bn.running_mean.add_(1),
    "a tensor": lambda vae, _: setattr(vae, "table", torch.ones(2)),
    "a submodule": lambda vae, _: setattr(vae.decoder, "conv_out", nn.Conv2d(8, 3, 1)),
    "a submodule's second name": lambda vae, _: vae.add_module("other", vae.decoder),
    "a shared weight": lambda vae, _: setattr(vae.decoder.conv_out, "bias", vae.encoder.conv_in.bias),
    "another method": lambda vae, patch: other(vae, patch, type(vae.encoder).forward),
    "a class attribute": lambda vae, patch: patch.setattr(type(vae), "_supports_gradient_checkpointing", 2),
    "a global": lambda vae, patch: patch.setattr(sys.modules[type(vae).__module__], "DEPTH", 2, raising=False),
    "a source": lambda _, patch: patch.setattr(fingerprint, "_digest", lambda name, _=True: f"edited {name}"),
    "a version": lambda _, patch: patch.setattr(torch, "__version__", "2.99"),
    "a variable": lambda _, patch: patch.setenv("DIFFUSERS_ATTN_BACKEND", "native"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_makes_another_key(name: str, flux2: nn.Module, monkeypatch: Patch) -> None:
    vae = copy.deepcopy(flux2)
    before = key(vae)
    assert key(copy.deepcopy(flux2)) == before
    CHANGES[name](vae, monkeypatch)
    assert key(vae) != before


def subclass(vae: Any, module: str) -> None:
    """A class that is defined in this process."""
    vae.decoder.__class__ = type("Other", (type(vae.decoder),), {"__module__": module})


REFUSED: dict[str, Callable[[Any, Patch], Any]] = {
    "a hook": lambda vae, _: vae.decoder.register_forward_hook(lambda *_: None),
    "a hook on all": lambda _, patch: patch.setitem(nn.modules.module._global_forward_hooks, 0, mine),
    "a replaced method": lambda vae, _: setattr(vae.decoder, "forward", vae.decoder.forward),
    "a patched class": lambda vae, patch: other(vae, patch, mine),
    "a decorated method": lambda vae, patch: other(vae, patch, torch.no_grad()(mine)),
    "a disguised method": lambda vae, patch: other(vae, patch, functools.wraps(nn.Conv2d.forward)(lambda self, z: z)),
    "a patched class of torch": lambda _, patch: patch.setattr(nn.Conv2d, "_conv_forward", mine),
    "a patched function": lambda _, patch: patch.setattr(nn.functional, "scaled_dot_product_attention", mine),
    "a patched import": lambda vae, patch: patch.setattr(sys.modules[type(vae).__module__], "apply_forward_hook", mine),
    "a subclass": lambda vae, _: subclass(vae, __name__),
    "a disguised subclass": lambda vae, _: subclass(vae, type(vae.decoder).__module__),
    "an unknown object": lambda vae, _: setattr(vae, "noise", random.Random(0)),
    "a function": lambda vae, _: setattr(vae, "notes", mine),
    "an unregistered module": lambda vae, _: setattr(vae, "others", [nn.Identity()]),
    "a large tensor": lambda vae, _: setattr(vae, "table", torch.ones(2**19)),
    "newer files": lambda _, patch: patch.setattr(fingerprint, "_STARTED", 0.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unstable_dependencies_have_no_key(name: str, flux2: nn.Module, monkeypatch: Patch) -> None:
    vae = copy.deepcopy(flux2)
    key(vae)
    fingerprint._digest.cache_clear()
    REFUSED[name](vae, monkeypatch)
    with pytest.raises(fingerprint.Unstable):
        key(vae)


def small() -> Any:
    """Modules of PyTorch; a mask is a constant of the graph."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()).requires_grad_(False)


def run(function: Any, modules: Any = (), width: int = 4, **options: Any) -> Any:
    """A call in a process that has no graph."""
    return halovae.shard(function, modules)(picture(width), options=options)


def picture(width: int = 4) -> Tensor:
    """The input."""
    return torch.linspace(-1, 1, 18 * width).view(1, 3, 6, width)


def test_weights_are_the_live_ones(traces: Traces) -> None:
    module = small()
    for count, function in enumerate((module, module.forward), 1):
        run(function)
        module[0].weight.mul_(2)
        assert torch.equal(run(function), module(picture()))
        assert len(traces) == count


def test_the_key_depends_on_everything_that_a_call_depends_on(traces: Traces) -> None:
    module = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    calls = (
        lambda: run(module),
        lambda: run(module, width=3),
        lambda: Sharded(module, [module], 2)(picture()),
        lambda: run(nn.ConvTranspose2d(3, 3, 2, 2).requires_grad_(False)),
        lambda: run(nn.ConvTranspose2d(3, 3, 2, 2).requires_grad_(False), output_size=[12, 8]),
    )
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(traces) == count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(module), module(picture()))
    assert len(traces) == len(calls) + 1


@pytest.mark.parametrize("damage", ["cut", "a byte", "text", "another key"])
def test_a_damaged_file_is_traced_again_and_replaced(damage: str, traces: Traces, folder: Path) -> None:
    module = small()
    expected = run(module)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "another key":
        run(module, width=3)
        traces.pop()
        (content,) = (one.read_bytes() for one in folder.iterdir() if one != path)
    middle = len(content) // 2
    path.write_bytes({
        "cut": content[:middle],
        "a byte": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "text": b"a letter to a friend",
        "another key": content,
    }[damage])  # fmt: skip
    for _ in range(2):
        assert torch.equal(run(module), expected)
        assert len(traces) == 2


def test_those_go_first_that_were_not_used_for_longest(traces: Traces, folder: Path, monkeypatch: Patch) -> None:
    module = small()
    paths: list[Path] = []
    for width in (1, 2, 3):
        run(module, width=width)
        (path,) = set(folder.iterdir()) - set(paths)
        os.utime(path, (1000 + width, 1000 + width))
        paths.append(path)
    run(module, width=1)  # read, and so used last
    assert paths[0].stat().st_mtime > 2000
    monkeypatch.setattr(stored, "LIMIT", sum(path.stat().st_size for path in paths[:2]) + 100)
    (folder / "notes.txt").write_text("not ours")
    run(module, width=4)
    assert [path.exists() for path in paths] == [True, False, False]
    assert (folder / "notes.txt").exists()
    assert len(traces) == 4


@pytest.mark.parametrize("why", ["in the way", "switched off", "large constants", "a lambda", "reads weights"])
def test_otherwise_each_process_traces(why: str, folder: Path, traces: Traces, monkeypatch: Patch) -> None:
    module = small()
    functions = {
        "a lambda": lambda x: module(x),
        "reads weights": lambda x: module(x) * (1 if module[0].bias.tolist()[0] > -9 else 2),
    }
    if why == "in the way":
        folder.write_text("not a folder")
    elif why == "switched off":
        monkeypatch.setenv("HALOVAE_GRAPHS", "0")
    elif why == "large constants":
        monkeypatch.setattr(stored, "LARGEST", -1)
    elif why == "reads weights":
        monkeypatch.setattr(stored, "fingerprint", lambda *_: "key")
    for _ in range(2):
        assert torch.equal(run(functions.get(why, module), module), module(picture()))
    assert len(traces) == 2
    assert not folder.is_dir()
