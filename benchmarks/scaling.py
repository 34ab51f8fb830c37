"""What two ranks could gain at most: halves decoded apart at once, without any message, beside a shared decode.

    python benchmarks/scaling.py

On a machine whose cores share caches and memory, two processes are slower than one twice over, whatever they decode.
What the shared decode takes beyond the halves' time is what halos cost.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from halovae import Grid
from halovae.bench.measure import Contestant, Model
from halovae.bench.models import FAMILIES, random_vae

CASES = {
    "whole, 1 rank": (1, Grid(), False),
    "whole, 2x1": (2, Grid(rows=2), False),
    "a half, 1 rank": (1, Grid(), True),
    "a half each, no messages": (2, Grid(batch=2), True),
}


def main() -> None:
    """Measure in turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(FAMILIES), default="wan2.1")
    parser.add_argument("--latent", default="1x16x3x32x32", help="BxCxTxHxW, of an even H")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    whole = torch.randn(*map(int, args.latent.split("x")), generator=torch.Generator().manual_seed(0))
    half = whole[..., : whole.shape[3] // 2, :].contiguous()
    with TemporaryDirectory() as folder:
        random_vae(args.model).save_pretrained(folder)
        model = Model(Path(folder), FAMILIES[args.model][0], torch.float32, "cpu")
        contestants = []
        for name, (ranks, grid, halved) in CASES.items():
            latents = torch.cat([half] * grid.batch) if halved else whole
            one = Contestant(name, model, ranks, 1, compiled=True, options={"grid": grid})
            one.warm_up(latents)
            contestants.append((one, latents))
        for _ in range(args.repeat):
            for one, latents in contestants:
                one.decode(latents)
        table = Table(title=f"{args.model}, {args.latent}, fp32, 1 thread a rank", title_justify="left")
        for column in ("decode", "median (s)", "all (s)", "waiting for halos (s)"):
            table.add_column(column)
        for one, _ in contestants:
            assert one.report is not None
            seconds = [taken.seconds for taken in one.taken]
            waiting = max(rank.waiting for rank in one.report.ranks)
            shown = " ".join(f"{each:.2f}" for each in seconds)
            table.add_row(one.name, f"{statistics.median(seconds):.2f}", shown, f"{waiting:.2f}")
            one.close()
    Console().print(table)


if __name__ == "__main__":
    main()
