"""Decode time and peak memory, halovae on one and more ranks beside diffusers, interleaved in one run.

    python benchmarks/decode.py --vs diffusers --ranks 1 2

All contestants hold the same true-size model on seeded random weights, each rank in a process and on threads of its
own, and take turns (A B A B ...). Times are those of the slowest rank. Peak memory is a process's peak resident
set; "above resting" is above the same process with the weights loaded and nothing decoded yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from halovae.bench.measure import Contestant, Model
from halovae.bench.models import FAMILIES, random_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", choices=["diffusers"], default="diffusers", help="whom to measure against")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="halovae's numbers of ranks")
    parser.add_argument("--model", choices=list(FAMILIES), default="wan2.1")
    parser.add_argument("--latent", default="1x16x3x32x32", help="BxCxTxHxW")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank and of diffusers")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    shape = [int(extent) for extent in args.latent.split("x")]
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1234)).to(DTYPES[args.dtype])
    console = Console()
    with TemporaryDirectory() as temporary, console.status("making the model") as status:
        random_vae(args.model).save_pretrained(temporary)
        model = Model(Path(temporary), FAMILIES[args.model][0], DTYPES[args.dtype], "cpu")
        contestants = [Contestant("diffusers", model, 1, args.threads, kind="diffusers")]
        contestants += [
            Contestant(f"halovae, {count} rank{'s' * (count > 1)}", model, count, args.threads, compiled=True)
            for count in args.ranks
        ]
        try:
            for contestant in contestants:
                contestant.warm_up(latents)
            for repeat in range(args.repeat):
                for contestant in contestants:
                    status.update(f"round {repeat + 1} of {args.repeat}: {contestant.name}")
                    contestant.decode(latents, keep=repeat == args.repeat - 1)
        finally:
            for contestant in contestants:
                contestant.close()
    report(console, contestants, f"{args.model}, {args.latent}, {args.dtype}, {args.threads} thread(s) a rank")


def report(console: Console, contestants: list[Contestant], title: str) -> None:
    """Print the table; ratios are of medians, against diffusers and the first of halovae's."""
    reference, single = contestants[0], contestants[1]
    table = Table(title=title, title_justify="left")
    for column in (
        "decode", "median (s)", "all (s)", "speed / diffusers", "speed / 1st halovae",
        "peak (MiB)", "/ 1st halovae", "above resting (MiB)", "/ diffusers", "/ 1st halovae", "max error",
    ):  # fmt: skip
        table.add_column(column)
    for one in contestants:
        peak, above = one.memory("peak_reserved"), one.memory("above_resting")
        assert one.frames is not None
        assert reference.frames is not None
        error = (one.frames.float() - reference.frames.float()).abs().max().item()
        table.add_row(
            one.name,
            f"{one.seconds:.2f}",
            " ".join(f"{taken.seconds:.2f}" for taken in one.taken),
            f"{reference.seconds / one.seconds:.2f}x",
            f"{single.seconds / one.seconds:.2f}x",
            f"{peak / 2**20:,.0f}",
            f"{peak / single.memory('peak_reserved'):.2f}",
            f"{above / 2**20:,.0f}",
            f"{above / reference.memory('above_resting'):.2f}",
            f"{above / single.memory('above_resting'):.2f}",
            f"{error:.1e}",
        )
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    main()
