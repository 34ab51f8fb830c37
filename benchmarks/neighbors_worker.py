"""Run one system of `neighbors.py` on all cases and grids. Prints a JSON line for each.

It needs torch, diffusers, and the system, but not halovae unless that is the system. Each case has ranks and a process
group of its own. Ranks are forks of this process, so that imports take their time only once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Module = Callable[[], nn.Module]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def attention(x: Any) -> Any:
    """Attention over all cells of a map, as a VAE calls it."""
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    out = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return out.squeeze(1).transpose(1, 2).reshape(x.shape)


def padded(x: Any) -> Any:
    return F.pad(x, (0, 1, 0, 1))


def kl(with_attention: bool = True) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=with_attention,
    )


def wan(with_attention: bool = True) -> nn.Module:
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    if not with_attention:
        for half in (vae.encoder, vae.decoder):
            half.mid_block.attentions = nn.ModuleList(nn.Identity() for _ in half.mid_block.attentions)
    return vae


def call(module: Any, x: Any) -> Any:
    return module(x)


def decode(vae: Any, latents: Any) -> Any:
    return vae.decode(latents, return_dict=False)[0]


def encode(vae: Any, pictures: Any) -> Any:
    return vae.encode(pictures, return_dict=False)[0].parameters


@dataclass(frozen=True)
class Case:
    """One operator or model.

    Args:
        name: the name in the table.
        make: makes the module; its weights are seeded, and perturbed afterwards.
        shape: shape of the input, whose last two dims are partitioned.
        run: calls the module.
        dtype: dtype of the input and the weights.
        mean: mean of the input.
        multiple: halovae's bounds are multiples of it.
        gradient: compare the gradient of the sum of squares with respect to the input.
    """

    name: str
    make: Module
    shape: tuple[int, ...]
    run: Callable[[Any, Any], Any] = call
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    multiple: int = 1
    gradient: bool = False


MAP = (1, 16, 32, 32)
CASES = (
    Case("3x3 convolution, padding 1", lambda: nn.Conv2d(16, 16, 3, padding=1), MAP),
    Case("3x3 convolution on 7 x 7 cells", lambda: nn.Conv2d(16, 16, 3, padding=1), (1, 16, 7, 7)),
    Case(
        "`F.pad(0, 1, 0, 1)`, 3x3 convolution, stride 2",
        lambda: nn.Sequential(Function(padded), nn.Conv2d(16, 16, 3, stride=2)),
        MAP,
    ),
    Case("3x3 convolution, stride 2, padding 1", lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1), MAP),
    Case("5x5 convolution, dilation 2, padding 4", lambda: nn.Conv2d(16, 16, 5, padding=4, dilation=2), MAP),
    Case(
        "7x7 convolution, dilation 3, 8 x 8 cells: halo deeper than a shard",
        lambda: nn.Conv2d(16, 16, 7, padding=9, dilation=3),
        (1, 16, 8, 8),
    ),
    Case("transposed 4x4 convolution, stride 2, padding 1", lambda: nn.ConvTranspose2d(16, 16, 4, 2, 1), MAP),
    Case("GroupNorm", lambda: nn.GroupNorm(4, 16, eps=1e-6), MAP),
    Case("GroupNorm in bf16, mean 20", lambda: nn.GroupNorm(4, 16, eps=1e-6), MAP, dtype=torch.bfloat16, mean=20.0),
    Case("nearest upsampling x2", lambda: nn.Upsample(scale_factor=2.0, mode="nearest"), MAP),
    Case("reflect padding 1", lambda: nn.ReflectionPad2d(1), MAP),
    Case("reflect padding 1, 3x3 convolution", lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), MAP),
    Case("attention over H x W tokens", lambda: Function(attention), (1, 16, 16, 16)),
    Case("AutoencoderKL, decode", kl, (1, 4, 16, 16), decode),
    Case("AutoencoderKL, decode, latent of 7 x 7", kl, (1, 4, 7, 7), decode),
    Case("AutoencoderKL without attention, decode", lambda: kl(False), (1, 4, 16, 16), decode),
    Case("AutoencoderKL, encode", kl, (1, 3, 32, 32), encode, multiple=2),
    Case("AutoencoderKL without attention, encode", lambda: kl(False), (1, 3, 32, 32), encode, multiple=2),
    Case("AutoencoderKLWan, decode, 5 frames", wan, (1, 4, 2, 8, 8), decode),
    Case("AutoencoderKLWan, encode, 5 frames", wan, (1, 3, 5, 64, 64), encode, multiple=8),
    Case("AutoencoderKLWan without attention, decode, 5 frames", lambda: wan(False), (1, 4, 2, 8, 8), decode),
    Case(
        "AutoencoderKLWan without attention, encode, 5 frames",
        lambda: wan(False),
        (1, 3, 5, 64, 64),
        encode,
        multiple=8,
    ),
    Case("gradient of a 3x3 convolution", lambda: nn.Conv2d(16, 16, 3, padding=1), MAP, gradient=True),
)


def prepared(case: Case) -> tuple[nn.Module, Tensor]:
    """Return the module and its input, the same in every process."""
    torch.manual_seed(0)
    module = case.make().eval()
    for one in module.parameters():
        one.data += 0.1 * torch.randn(one.shape)
    x = torch.randn(case.shape, dtype=torch.float64) + case.mean
    return module.to(case.dtype).requires_grad_(case.gradient), x.to(case.dtype)


def result(case: Case, module: Any, x: Any) -> Any:
    """Return what the case compares, in plain torch or with a system's tensors."""
    if not case.gradient:
        with torch.no_grad():
            return case.run(module, x)
    x = x.detach().requires_grad_(True)
    case.run(module, x).square().sum().backward()
    return x.grad


@dataclass
class Found:
    """The result on one rank.

    Attributes:
        labeled: the shape that the system reports.
        local: the shape of what this rank holds.
        full: the whole result.
        received: bytes that this rank received, without the distribution of the input and the whole result.
    """

    labeled: tuple[int, ...]
    local: tuple[int, ...]
    full: Tensor
    received: int


def received() -> int:
    """Return the bytes that all TCP connections of this process have received, by the kernel's counters."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6):
                        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += int.from_bytes(info[128:136], sys.byteorder)  # tcpi_bytes_received
    return total


def second(function: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of the second call, after connections and graphs are made, and the bytes received."""
    function()
    dist.barrier()
    before = received()
    out = function()
    return out, received() - before


def halovae_system(case: Case, module: nn.Module, x: Tensor, rows: int, cols: int) -> Found:
    halovae = importlib.import_module("halovae")
    grid = halovae.Grid(rows=rows, cols=cols)
    sharded = halovae.shard(lambda one: case.run(module, one), module, multiple=case.multiple)
    if case.gradient:
        result(case, lambda one: sharded(one, grid=grid, gather="none"), x)
        raise AssertionError("gradients are refused")
    local, count = second(lambda: sharded(x, grid=grid, gather="none"))
    labeled = sharded.report.shape
    return Found(labeled, tuple(local.shape), sharded(x, grid=grid, gather="all"), count)


def placed(rows: int, cols: int) -> tuple[Any, list[Any]]:
    """Return a device mesh of the dims that have several ranks, and the placements of a plane on it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    dims = [(name, size, dim) for name, size, dim in (("rows", rows, -2), ("cols", cols, -1)) if size > 1]
    mesh = init_device_mesh(
        "cpu", tuple(size for _, size, _ in dims), mesh_dim_names=tuple(name for name, _, _ in dims)
    )
    return mesh, [Shard(dim) for _, _, dim in dims]


def dtensor_system(case: Case, module: nn.Module, x: Tensor, rows: int, cols: int) -> Found:
    from torch.distributed.tensor import distribute_module, distribute_tensor

    mesh, placements = placed(rows, cols)
    distribute_module(module, mesh)
    sharded = distribute_tensor(x, mesh, placements)
    out, count = second(lambda: result(case, module, sharded))
    return Found(tuple(out.shape), tuple(out.to_local().shape), out.full_tensor().detach(), count)


def shardtensor_system(case: Case, module: nn.Module, x: Tensor, rows: int, cols: int) -> Found:
    from torch.distributed.tensor import Replicate

    parallel = importlib.import_module("physicsnemo.domain_parallel")
    mesh, placements = placed(rows, cols)
    whole = parallel.ShardTensor.from_local(x, mesh, [Replicate()] * mesh.ndim)
    sharded = whole.redistribute(mesh, [type(one)(one.dim + x.ndim) for one in placements])
    out, count = second(lambda: result(case, module, sharded))
    return Found(tuple(out.shape), tuple(out.to_local().shape), out.full_tensor().detach(), count)


SYSTEMS = {"halovae": halovae_system, "dtensor": dtensor_system, "shardtensor": shardtensor_system}


def text_of(error: BaseException) -> str:
    """Return the class of an error and its first line, without what differs between runs."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?<![\w:/])/[\w./+-]*/([\w.+-]+)", r"\1", lines[0] if lines else "")
    text = re.sub(r"\[?\d+\.\d+\.\d+\.\d+\]?:\d+", "another rank", text)
    text = re.split(r" +\(Could this| +If you need", re.sub(r"0x[0-9a-f]+", "0x...", text))[0]
    return f"{type(error).__name__}: {text[:200]}".rstrip(": ")


def rank_main(system: str, case: Case, rows: int, cols: int, rank: int, folder: Path) -> None:
    """Run a case on one rank. Its findings go to a file of its own."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    try:
        module, x = prepared(case)
        expected = result(case, copy.deepcopy(module).double(), x.double()).detach()
        plain = result(case, copy.deepcopy(module), x).detach()
        module.zero_grad()
        facts |= {
            "plain": (plain.double() - expected).abs().max().item(),
            "largest": expected.abs().max().item(),
            "sum": expected.sum().item(),
            "numel": expected.numel(),
        }
        store = dist.FileStore(str(folder / "store"), rows * cols)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=rows * cols)
        found = SYSTEMS[system](case, module, x, rows, cols)
        facts |= {
            "expected": list(expected.shape),
            "labeled": list(found.labeled),
            "local": list(found.local),
            "full": list(found.full.shape),
            "received": found.received,
        }
        if found.full.shape == expected.shape:
            facts["error"] = (found.full.double() - expected).abs().max().item()
        dist.barrier()  # a rank that leaves closes its connections
    except BaseException as error:
        facts |= {"raised": text_of(error), "time": time.time(), "trace": traceback.format_exc()[-3000:]}
    (folder / f"{rank}.part").write_text(json.dumps(facts))
    (folder / f"{rank}.part").rename(folder / f"{rank}.json")
    os._exit(0)  # without waiting for anything of a broken group


def attempt(system: str, case: Case, rows: int, cols: int, timeout: float) -> list[dict[str, Any] | None]:
    """Return the findings of each rank of a new process group; None for a rank that was too slow or crashed."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=rank_main, args=(system, case, rows, cols, rank, folder))
            for rank in range(rows * cols)
        ]
        for one in ranks:
            one.start()
        end = time.monotonic() + timeout
        for one in ranks:
            one.join(max(0.0, end - time.monotonic()))
        for one in ranks:
            if one.is_alive():
                one.kill()
            one.join()
        files = [folder / f"{rank}.json" for rank in range(len(ranks))]
        found = [json.loads(file.read_text()) if file.exists() else None for file in files]
        for one, facts in zip(ranks, found, strict=True):
            if facts is None and one.exitcode not in (0, -signal.SIGKILL, None):
                return [{"raised": f"a rank died of signal {-(one.exitcode or 0)}", "time": 0.0}]
        return found


def outcome(found: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Combine the findings of all ranks."""
    raised = sorted((one for one in found if one and "raised" in one), key=lambda one: one["time"])
    if raised:
        # A rank that raises closes its connections, so that others raise later.
        first = ([one for one in raised if "onnection" not in one["raised"]] or raised)[0]
        if "CUDA" in first["raised"]:  # the message of a fork; another process would find no driver
            return {"needs_cuda": True}
        return {"raised": first["raised"], "trace": first.get("trace", ""), "some_hang": None in found}
    ranks = [one for one in found if one is not None]
    if len(ranks) < len(found):
        return {"hangs": True}
    first = ranks[0]
    facts = {key: first[key] for key in ("plain", "largest", "sum", "expected")}
    for key in ("labeled", "full"):
        wrong = [one[key] for one in ranks if one[key] != first["expected"]]
        facts[key] = wrong[0] if wrong else first[key]
    return facts | {
        "error": max(one["error"] for one in ranks) if all("error" in one for one in ranks) else None,
        "replicated": all(one["local"] == first["expected"] for one in ranks),
        "received": sum(one["received"] for one in ranks),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--grids", nargs="+", default=["2x1"])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one case")
    args = parser.parse_args()
    diffusers = importlib.import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    for name in ("AutoencoderKL", "AutoencoderKLWan"):  # import them before ranks are forked
        getattr(diffusers, name)
    importlib.import_module("torch.distributed.tensor")
    if args.system == "halovae":
        importlib.import_module("halovae")
    if args.system == "shardtensor":
        # Without CUDA the package does not register them by itself.
        importlib.import_module("physicsnemo.domain_parallel").register_custom_ops()
    packages = ("torch", "diffusers", "halovae", "nvidia-physicsnemo")
    print(json.dumps({"versions": {name: version(name) for name in packages}}), flush=True)
    for grid in args.grids:
        rows, cols = map(int, grid.split("x"))
        for case in CASES:
            if args.only.lower() not in case.name.lower():
                continue
            facts = outcome(attempt(args.system, case, rows, cols, args.timeout))
            if facts.get("hangs"):  # the machine may have been busy: try again
                facts = outcome(attempt(args.system, case, rows, cols, 2 * args.timeout))
            print(json.dumps({"case": case.name, "grid": grid, **facts}), flush=True)


if __name__ == "__main__":
    main()
