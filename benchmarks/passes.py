"""A recorded graph with passes added one by one, and the module: time, peak of live tensors, nodes, and copies.

    python benchmarks/passes.py
    python benchmarks/passes.py --model flux --latent 1x16x64x64 --repeat 3 --compiled

One thread. All take turns; times are medians. Kernels are compiled from the first pass on. Errors are relative to the
largest value.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.distributed.ranks import Ranks
from halovae.kernels.native import compiled
from halovae.models import zoo
from halovae.models.architectures import random_vae
from halovae.models.registry import families
from halovae.plane.passes import PASSES
from halovae.plane.program import Program
from halovae.plane.trace import trace

CASES = {
    "qwen-image": "1x16x1x32x32",
    "wan2.1": "1x16x2x16x16",
    "flux": "1x16x32x32",
    "hunyuan-video-1.5": "1x32x1x16x16",
    "sana": "1x32x16x16",
}
CPU = torch.device("cpu")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
MODULE = ("module, eager", "module, channels-last")
COMPILED = ("module, compiled", "module, channels-last, compiled")
_held: dict[str, Any] = {}


def steps() -> dict[str, tuple[str, ...]]:
    """Return the passes of each step by its name."""
    names = list(PASSES)
    return {"recorded": (), **{f"+ {name}": tuple(names[: index + 1]) for index, name in enumerate(names)}}


def hold(name: str, latents: Tensor) -> None:
    """Make a model and its reference in the process that decodes."""
    _held.clear()
    _held["module"] = random_vae(name)
    with torch.no_grad():
        _held["reference"] = zoo.decode(_held["module"], latents)


def record(step: str, latents: Tensor) -> tuple[int, int, int, float]:
    """Record a step's program, and run it. Return its peak, nodes, copies, and error."""
    os.environ["HALOVAE_PASSES"] = ",".join(steps()[step])
    module, mesh = _held["module"], Mesh(Grid(), CPU)
    program: Program = trace(lambda z: zoo.decode(module, z), [module], mesh, latents.shape, latents.dtype, CPU)
    _held[step] = program
    reference = _held["reference"]
    error = (program(latents.clone(), mesh, kernels=compiled()) - reference).abs().max() / reference.abs().max()
    targets = [str(node.target) for node in program.nodes()]
    copies = sum(any(word in target for word in ("clone", "pad", "cat", "_to_copy")) for target in targets)
    return program.peak, len(targets), copies, float(error)


def run(step: str, latents: Tensor) -> float:
    """Return the seconds of one decode by a recorded program."""
    mesh, x = Mesh(Grid(), CPU), latents.clone()
    begin = time.perf_counter()
    _held[step](x, mesh, kernels=compiled())
    return time.perf_counter() - begin


def run_module(kind: str, latents: Tensor) -> float:
    """Return the seconds of one decode by the module itself."""
    if kind not in _held:
        module = random_vae(_held["module_name"]) if "channels" in kind else _held["module"]
        if "channels" in kind:
            module.load_state_dict(_held["module"].state_dict())
            for weight in module.parameters():
                if weight.ndim in FORMATS:
                    weight.data = weight.data.contiguous(memory_format=FORMATS[weight.ndim])
        _held[kind] = module
        if "compiled" in kind:
            _held[kind].decoder.compile()
        run_module(kind, latents)
    begin = time.perf_counter()
    with torch.no_grad():
        zoo.decode(_held[kind], latents)
    return time.perf_counter() - begin


def name_module(name: str) -> None:
    """Set the model that `run_module` makes."""
    _held["module_name"] = name


def main() -> None:
    """Measure in turns, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(families()), help="one model instead of five")
    parser.add_argument("--latent", help="BxCxTxHxW or BxCxHxW, with --model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--compiled", action="store_true", help="also run the module compiled by Inductor, which takes long"
    )
    parser.add_argument("--brief", action="store_true", help="only without passes, and with all of them")
    parser.add_argument("--output", type=Path, help="also write the tables to this file, as Markdown")
    args = parser.parse_args()
    cases = CASES if args.model is None else {args.model: args.latent or CASES.get(args.model, "1x16x32x32")}
    console, text = Console(width=120), []
    modules = MODULE + (COMPILED if args.compiled else ())
    for name, latent in cases.items():
        latents = torch.randn(*map(int, latent.split("x")), generator=torch.Generator().manual_seed(0))
        with Ranks(1) as ranks, console.status(f"{name}: recording") as status:
            ranks.run(hold, name, latents)
            ranks.run(name_module, name)
            shown = list(steps())
            shown = [shown[0], shown[-1]] if args.brief else shown
            facts = {step: ranks.run(record, step, latents)[0] for step in shown}
            taken: dict[str, list[float]] = {one: [] for one in (*modules, *facts)}
            for turn in range(args.repeat):
                for one, seconds in taken.items():
                    status.update(f"{name}: turn {turn + 1} of {args.repeat}, {one}")
                    seconds += ranks.run(run if one in facts else run_module, one, latents)
        medians = {one: statistics.median(seconds) for one, seconds in taken.items()}
        best = min(medians[one] for one in modules)
        table = Table(title=f"{name}, {latent}, fp32, 1 thread", title_justify="left")
        columns = ("", "median (s)", "x the module's best", "peak (MB)", "nodes", "copies", "error")
        rows = []
        for one, median in medians.items():
            peak, nodes, copies, error = facts.get(one, (0, 0, 0, 0.0))
            known = (f"{peak / 1e6:.0f}", str(nodes), str(copies), f"{error:.0e}") if one in facts else ("", "", "", "")
            rows.append((one, f"{median:.2f}", f"{best / median:.2f}", *known))
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        text += [f"{name}, {latent}:", "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        if args.output is not None:
            args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
