"""Decode time and peak memory, halovae on one and more ranks beside diffusers and SGLang, interleaved in one run.

    python benchmarks/decode.py --vs diffusers --ranks 1 2
    python benchmarks/decode.py --all --peers DIR_OF_PEER_SCRIPTS --peers-python THEIR_PYTHON

All contestants hold a true-size model on seeded random weights, each rank in a process and on threads of its own, and
take turns (A B A B ...) once they are warm. Times are those of the slowest rank. Peak memory is a process's peak
resident set; "above resting" is above the same process with the weights loaded and nothing decoded yet.
`--all` runs the cases that have targets, and says which are reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halovae.bench.measure import Contestant, Model
from halovae.bench.models import FAMILIES, random_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE, TWO = "halovae, 1 rank", "halovae, 2 ranks"
DIFFUSERS, THREADS, SGLANG = "diffusers", "diffusers, 2 threads", "SGLang, 2 ranks"


@dataclass(frozen=True)
class Case:
    """What is decoded and by whom, and how many times faster, or smaller, who must be than whom."""

    model: str
    latent: str
    dtype: str
    ranks: tuple[int, ...] = (1,)
    threads: int = 1
    two_threads: bool = False
    peer: str | None = None
    faster: tuple[tuple[str, str, float], ...] = ()
    smaller: tuple[tuple[str, str, float], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.model}, {self.latent}, {self.dtype}"


ALL = (
    Case(
        "wan2.1", "1x16x3x32x32", "fp32", (1, 2), two_threads=True, peer="wan",
        faster=((ONE, DIFFUSERS, 1.8), (TWO, ONE, 1.85), (TWO, SGLANG, 1.8), (TWO, THREADS, 1.8)),
        smaller=((ONE, DIFFUSERS, 0.75), (TWO, SGLANG, 0.75)),
    ),
    Case(
        "qwen-image", "1x16x1x32x32", "fp32", (1, 2), two_threads=True, peer="qwen",
        faster=((ONE, DIFFUSERS, 3.0), (TWO, SGLANG, 2.8), (TWO, THREADS, 2.8)),
    ),
    Case("qwen-image", "1x16x1x32x32", "bf16", faster=((ONE, DIFFUSERS, 2.8),)),
    Case("wan2.2-5b", "1x48x2x16x16", "fp32", faster=((ONE, DIFFUSERS, 1.5),)),
    Case("wan2.1", "1x16x3x32x32", "bf16", faster=((ONE, DIFFUSERS, 1.8),)),
)  # fmt: skip


@dataclass
class Figures:
    """What one contestant took, over its decodes."""

    seconds: list[float] = field(default_factory=list)
    peak: float = 0
    above_resting: float = 0
    error: float = 0
    warmup: float = 0


@dataclass(frozen=True)
class Peer:
    """SGLang's spatially sharded decode, by a script that decodes `--latent` and prints a line of JSON."""

    script: Path
    python: str

    def decode(self, case: Case, into: Figures) -> None:
        """Decode once in processes of its own, warmed up on a crop."""
        command = [self.python, str(self.script), "--model", str(case.peer), "--mode", "spatial_shard"]
        command += ["--latent", case.latent, "--ranks", "2", "--threads", "1", "--reps", "1", "--smallwarm", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [done.stderr[-500:] or "nothing"]
        said: dict[str, Any] = json.loads(lines[-1]) if lines[-1].startswith("{") else {"failed": lines[-1]}
        if said.get("failed"):
            raise SystemExit(f"{self.script}: {said}")
        into.seconds.append(said["median_s"])
        into.peak = max(said["peak_rss_mb_per_rank"])
        rests = zip(said["peak_rss_mb_per_rank"], said["rss_before_decode_mb"], strict=True)
        into.above_resting = max(peak - rest for peak, rest in rests)
        into.error = said["max_abs_err"]


def measure(case: Case, repeat: int, peer: Peer | None, console: Console) -> dict[str, Figures]:
    """Decode `repeat` times by each in turn."""
    shape = [int(extent) for extent in case.latent.split("x")]
    dtype = DTYPES[case.dtype]
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1234)).to(dtype)
    with TemporaryDirectory() as temporary, console.status("making the model") as status:
        random_vae(case.model).save_pretrained(temporary)
        model = Model(Path(temporary), FAMILIES[case.model][0], dtype, "cpu")
        contestants = [Contestant(DIFFUSERS, model, 1, case.threads, kind="diffusers")]
        if case.two_threads:
            contestants.append(Contestant(THREADS, model, 1, 2, kind="diffusers"))
        for ranks in case.ranks:
            name = f"halovae, {ranks} rank{'s' * (ranks > 1)}"
            contestants.append(Contestant(name, model, ranks, case.threads, compiled=True))
        found = {contestant.name: Figures() for contestant in contestants}
        if peer is not None and case.peer:
            found[SGLANG] = Figures()
        try:
            for contestant in contestants:
                status.update(f"{case.title}: warming up {contestant.name}")
                contestant.warm_up(latents)
            for turn in range(repeat):
                for contestant in contestants:
                    status.update(f"{case.title}: round {turn + 1} of {repeat}: {contestant.name}")
                    contestant.decode(latents, keep=turn == repeat - 1)
                if peer is not None and case.peer:
                    status.update(f"{case.title}: round {turn + 1} of {repeat}: {SGLANG}")
                    peer.decode(case, found[SGLANG])
        finally:
            for contestant in contestants:
                contestant.close()
    reference = contestants[0].frames
    for one in contestants:
        assert one.frames is not None
        assert reference is not None
        figures = found[one.name]
        figures.seconds = [taken.seconds for taken in one.taken]
        figures.peak = one.memory("peak_reserved") / 2**20
        figures.above_resting = one.memory("above_resting") / 2**20
        figures.error = (one.frames.float() - reference.float()).abs().max().item()
        figures.warmup = one.warmup_seconds
    return found


def report(console: Console, case: Case, found: dict[str, Figures]) -> None:
    """Print the table; ratios are of medians, against diffusers and the first of halovae's."""
    reference, single = found[DIFFUSERS], next(figures for name, figures in found.items() if name.startswith("halovae"))
    table = Table(title=f"{case.title}, {case.threads} thread(s) a rank", title_justify="left")
    for column in (
        "decode", "median (s)", "all (s)", "speed / diffusers", "speed / 1st halovae", "warm-up (s)",
        "peak (MiB)", "above resting (MiB)", "/ diffusers", "/ 1st halovae", "max error",
    ):  # fmt: skip
        table.add_column(column)
    for name, one in found.items():
        seconds = statistics.median(one.seconds)
        table.add_row(
            name,
            f"{seconds:.2f}",
            " ".join(f"{taken:.2f}" for taken in one.seconds),
            f"{statistics.median(reference.seconds) / seconds:.2f}x",
            f"{statistics.median(single.seconds) / seconds:.2f}x",
            f"{one.warmup:.1f}",
            f"{one.peak:,.0f}",
            f"{one.above_resting:,.0f}",
            f"{one.above_resting / reference.above_resting:.2f}",
            f"{one.above_resting / single.above_resting:.2f}",
            f"{one.error:.1e}",
        )
    console.print(table)


def targets(case: Case, found: dict[str, Figures]) -> list[list[str]]:
    """Lines of what was to be reached and what was, as far as both took part."""
    lines = []
    for who, whom, bound in case.faster:
        if who in found and whom in found:
            reached = statistics.median(found[whom].seconds) / statistics.median(found[who].seconds)
            verdict = "yes" if reached >= bound else "NO"
            lines.append([case.title, f"{who} against {whom}", f">= {bound}x", f"{reached:.2f}x", verdict])
    for who, whom, bound in case.smaller:
        if who in found and whom in found:
            reached = found[who].above_resting / found[whom].above_resting
            verdict = "yes" if reached <= bound else "NO"
            lines.append([case.title, f"memory, {who} / {whom}", f"<= {bound}", f"{reached:.2f}", verdict])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all cases that have targets, instead of one")
    parser.add_argument("--vs", choices=["diffusers"], default="diffusers", help="whom to measure one case against")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="halovae's numbers of ranks")
    parser.add_argument("--model", choices=list(FAMILIES), default="wan2.1")
    parser.add_argument("--latent", default="1x16x3x32x32", help="BxCxTxHxW")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank and of diffusers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="folder with sglang_decode.py, for SGLang's rows")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has SGLang")
    args = parser.parse_args()
    peer = None if args.peers is None else Peer(args.peers / "sglang_decode.py", args.peers_python)
    one = Case(args.model, args.latent, args.dtype, tuple(args.ranks), args.threads)
    console = Console()
    console.width = max(console.width, 160)
    reached = []
    for case in ALL if args.all else (one,):
        found = measure(case, args.repeat, peer, console)
        report(console, case, found)
        reached += targets(case, found)
    if reached:
        table = Table(title="targets", title_justify="left")
        for column in ("case", "figure", "target", "reached", "met"):
            table.add_column(column)
        for line in reached:
            table.add_row(*line)
        console.print(table)


if __name__ == "__main__":
    main()
