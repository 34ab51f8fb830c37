"""What each step towards a fast decode gave, measured by taking it away, and a picture of it.

    python benchmarks/steps.py --plot docs/images/steps.png

One rank, one thread, true-size models on seeded random weights. The steps add up from left to right; all take turns in
one process, but for diffusers' own decode, which has one of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halovae import Grid, load
from halovae.bench.measure import Contestant, Model
from halovae.distributed.ranks import Ranks
from halovae.kernels import winograd
from halovae.kernels.native import Kernels, compiled, ready
from halovae.kernels.schemes import PLAIN, Scheme
from halovae.models.architectures import FAMILIES, random_vae
from halovae.plane import sharded

CASES = (("wan2.1", "1x16x2x32x32"), ("qwen-image", "1x16x1x32x32"))
_held: dict[str, Any] = {}
_pays = winograd.pays


def hold(folder: Path) -> None:
    """In the process that decodes."""
    _held["decoder"] = load(folder)


def never(*_: object) -> bool:
    """Convolve directly."""
    return False


def always(scheme: Scheme, weight: torch.Tensor, cells: int, kernels: Kernels, device: str) -> bool:
    """Winograd also where only compiled passes make it pay."""
    return _pays(scheme, weight, cells, compiled(), device)


def not_upsampling(scheme: Scheme, weight: torch.Tensor, cells: int, kernels: Kernels, device: str) -> bool:
    """Winograd where there is nothing to upsample."""
    return scheme is PLAIN and always(scheme, weight, cells, kernels, device)


STEPS: dict[str, tuple[Callable[..., bool], bool]] = {
    "2-D first frame,\nchannels-last,\nno concatenation": (never, False),
    "Winograd": (not_upsampling, False),
    "upsampling folded": (always, False),
    "compiled passes": (always, True),
}


def decode(latents: torch.Tensor, step: str) -> float:
    """Seconds of one decode with this step and those before it."""
    winograd.pays, use_compiled = STEPS[step]
    vars(sharded)["ready"] = lambda device: use_compiled and ready(device, wait=True)
    stream = _held["decoder"].stream(latents, grid=Grid())
    stream.join()
    return float(stream.report.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="where to draw it")
    args = parser.parse_args()
    console = Console()
    medians: dict[str, list[float]] = {}
    for family, latent in CASES:
        latents = torch.randn([int(extent) for extent in latent.split("x")], generator=torch.Generator().manual_seed(1))
        with TemporaryDirectory() as folder, Ranks(1) as ours, console.status("making the model") as status:
            random_vae(family).save_pretrained(folder)
            model = Model(Path(folder), FAMILIES[family][0], torch.float32, "cpu")
            theirs = Contestant("diffusers", model, 1, 1, kind="diffusers")
            theirs.warm_up(latents)
            ours.run(hold, Path(folder))
            for step in STEPS:
                ours.run(decode, latents[..., :16, :16], step)
            taken: dict[str, list[float]] = {step: [] for step in STEPS}
            for turn in range(args.repeat):
                status.update(f"{family}: round {turn + 1} of {args.repeat}")
                theirs.decode(latents)
                for step, seconds in taken.items():
                    seconds += ours.run(decode, latents, step)
            theirs.close()
        medians[f"{family}, {latent}"] = [theirs.seconds, *(statistics.median(seconds) for seconds in taken.values())]
    names = ["diffusers", *(name.replace("\n", " ") for name in STEPS)]
    table = Table(title="seconds, and times diffusers' speed: each step with those before it", title_justify="left")
    for column in ("case", *names):
        table.add_column(column)
    for case, seconds in medians.items():
        table.add_row(case, *(f"{one:.2f} ({seconds[0] / one:.2f}x)" for one in seconds))
    console.width = max(console.width, 150)
    console.print(table)
    print(json.dumps({"steps": names, "seconds": medians}))
    if args.plot is not None:
        draw(medians, ["diffusers", *STEPS], args.plot)


def draw(medians: dict[str, list[float]], names: list[str], path: Path) -> None:
    """A waterfall: what each step took away of the time before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (case, seconds) in zip(figure.subplots(1, len(medians)), medians.items(), strict=True):
        for index, now in enumerate(seconds):
            axes.bar(index, now, color="tab:blue" if index else "tab:gray")
            if index:
                axes.bar(index, seconds[index - 1] - now, bottom=now, color="tab:green", alpha=0.35)
            axes.text(index, now / 2, f"{now:.1f} s\n{seconds[0] / now:.2f}x", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_ylabel("decode (s)")
        axes.set_title(f"{case}, fp32, 1 thread", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
