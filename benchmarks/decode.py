"""Decode time and peak memory, halovae on one and more ranks beside diffusers, interleaved in one run.

    python benchmarks/decode.py --vs diffusers --ranks 1 2

All contestants hold the same true-size model on seeded random weights, each rank in a process and on threads of its
own, and take turns (A B A B ...). Times are those of the slowest rank. Peak memory is a process's peak resident
set; "above resting" is above the same process with the weights loaded and nothing decoded yet.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from halovae import load
from halovae.bench.models import FAMILIES, random_vae
from halovae.bench.ranks import Ranks
from halovae.decode import Decoder
from halovae.memory import MemoryMeter
from halovae.platform import RANK_ENVIRONMENT, Platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = Platform(torch.device("cpu"))
_held: dict[str, Any] = {}


def hold_diffusers(folder: Path, family: str, dtype: torch.dtype) -> None:
    """Load diffusers' VAE in this process, its encoder thrown away."""
    import diffusers

    vae = getattr(diffusers, FAMILIES[family][0]).from_pretrained(folder, torch_dtype=dtype)
    vae.encoder = vae.quant_conv = None
    for parameter in vae.parameters():  # weights mapped from a file are not in memory before they are used
        parameter.data = parameter.data.clone()
    _hold(lambda latents: vae.decode(latents).sample)


def hold_halovae(folder: Path, family: str, dtype: torch.dtype) -> None:
    """Load halovae's decoder in this process."""
    decoder: Decoder = load(folder, dtype=dtype, device="cpu")
    _hold(decoder.decode)


def _hold(decode: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    # Resting is what this process holds before its first decode: later, the allocator keeps some of what was freed.
    _held.update(decode=decode, resting=MemoryMeter(CPU).resting)


def decode_once(latents: torch.Tensor, keep: bool) -> tuple[float, int, int, torch.Tensor | None]:
    """Seconds, peak resident set, its part above the resting process, and, if kept, the frames."""
    if dist.is_initialized():
        dist.barrier()
    memory = MemoryMeter(CPU)
    begin = time.perf_counter()
    with torch.inference_mode():
        frames = _held["decode"](latents)
    seconds = time.perf_counter() - begin
    peak = memory.read().peak_reserved
    return seconds, peak, peak - _held["resting"], frames if keep else None


@dataclass
class Contestant:
    name: str
    group: Ranks
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    frames: torch.Tensor | None = None

    def turn(self, latents: torch.Tensor, last: bool) -> None:
        results = self.group.run(decode_once, latents, last)
        self.seconds.append(max(result[0] for result in results))
        self.peaks.append(max(result[1] for result in results))
        self.above.append(max(result[2] for result in results))
        self.frames = results[0][3]


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
    crop = latents[:, :, :2, : max(args.ranks), : max(args.ranks)]
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, console.status("making the model") as status:
        random_vae(args.model).save_pretrained(temporary)
        entries: list[tuple[str, int, Callable[..., None]]] = [("diffusers", 1, hold_diffusers)]
        entries += [(f"halovae, {count} rank{'s'[: count - 1]}", count, hold_halovae) for count in args.ranks]
        contestants = []
        for name, count, hold in entries:
            environment = {} if hold is hold_diffusers else RANK_ENVIRONMENT  # diffusers as its users run it
            contestant = Contestant(name, Ranks(count, args.threads, environment))
            contestant.group.run(hold, Path(temporary), args.model, DTYPES[args.dtype])
            contestant.group.run(decode_once, crop, False)  # what is only done the first time
            contestants.append(contestant)
        for repeat in range(args.repeat):
            for contestant in contestants:
                status.update(f"round {repeat + 1} of {args.repeat}: {contestant.name}")
                contestant.turn(latents, repeat == args.repeat - 1)
        for contestant in contestants:
            contestant.group.close()
    report(console, contestants, f"{args.model}, {args.latent}, {args.dtype}, {args.threads} thread(s) a rank")


def report(console: Console, contestants: list[Contestant], title: str) -> None:
    """Print the table; ratios are of medians, against the row named."""
    reference, single = contestants[0], contestants[1]
    table = Table(title=title, title_justify="left")
    for column in (
        "decode", "median (s)", "all (s)", "speed / diffusers", "speed / 1st halovae",
        "peak (MiB)", "/ 1st halovae", "above resting (MiB)", "/ diffusers", "/ 1st halovae", "max error",
    ):  # fmt: skip
        table.add_column(column)
    for one in contestants:
        seconds, above, peak = (statistics.median(values) for values in (one.seconds, one.above, one.peaks))
        assert one.frames is not None
        assert reference.frames is not None
        error = (one.frames.float() - reference.frames.float()).abs().max().item()
        table.add_row(
            one.name,
            f"{seconds:.2f}",
            " ".join(f"{s:.2f}" for s in one.seconds),
            f"{statistics.median(reference.seconds) / seconds:.2f}x",
            f"{statistics.median(single.seconds) / seconds:.2f}x",
            f"{peak / 2**20:,.0f}",
            f"{peak / statistics.median(single.peaks):.2f}",
            f"{above / 2**20:,.0f}",
            f"{above / statistics.median(reference.above):.2f}",
            f"{above / statistics.median(single.above):.2f}",
            f"{error:.1e}",
        )
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    main()
