"""Decode (or encode) time and peak memory: halovae on one and more ranks, diffusers, and SGLang, in one run.

    python benchmarks/decode.py --model wan2.1 --shape 1x16x3x32x32 --ranks 1 2
    python benchmarks/decode.py --all
    python benchmarks/decode.py --all --only flux --peers DIR_OF_PEER_SCRIPTS --peers-python THEIR_PYTHON

All contestants have a true-size model on seeded random weights, each rank in a process and on threads of its own.
diffusers is tried in four ways: eager, with channels last, with its decoder compiled, and with both. The fastest of
these takes turns with the other contestants (A B A B ...) after warming up. Times are those of the slowest rank. Peak
memory is a process's peak resident set; "above resting" is relative to the process with the weights loaded and nothing
decoded yet. `--all` runs the cases that have targets, and says which targets are reached.
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
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halovae.bench.measure import Contestant, Model
from halovae.errors import RankError
from halovae.models.architectures import random_vae
from halovae.models.registry import families
from halovae.runtime.options import Call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE, TWO = "halovae, 1 rank", "halovae, 2 ranks"
TRIES = 2  # calls of each of diffusers' ways; the fastest counts
EAGER, BEST, SGLANG = "diffusers, eager", "diffusers, at its best", "SGLang, 2 ranks"
# Other ways to run diffusers: whether with channels last, and whether compiled.
WAYS = {
    "diffusers, channels last": (True, False),
    "diffusers, compiled": (False, True),
    "diffusers, both": (True, True),
}


@dataclass(frozen=True)
class Case:
    """A decode, its contestants, and its targets.

    Attributes:
        peer: the model's name for SGLang's script; None to leave SGLang out.
        faster: pairs of contestants, and how many times as fast the first must be as the second.
        smaller: pairs of contestants, and the largest ratio of the first's memory above resting to the second's.
    """

    model: str
    shape: str
    dtype: str
    ranks: tuple[int, ...] = (1,)
    threads: int = 1
    call: Call = "decode"
    peer: str | None = None
    faster: tuple[tuple[str, str, float], ...] = ()
    smaller: tuple[tuple[str, str, float], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.model}, {self.call} of {self.shape}, {self.dtype}"


ALL = (
    Case("qwen-image", "1x16x1x32x32", "fp32", (1, 2), peer="qwen", faster=((ONE, BEST, 3.5), (TWO, SGLANG, 2.0))),
    Case("qwen-image", "1x16x1x32x32", "bf16", faster=((ONE, BEST, 2.5),)),
    Case(
        "wan2.1", "1x16x3x32x32", "fp32", (1, 2), peer="wan", faster=((ONE, BEST, 2.2), (TWO, SGLANG, 2.0)),
        smaller=((ONE, EAGER, 0.75),),
    ),
    Case("wan2.1", "1x16x3x32x32", "bf16", faster=((ONE, BEST, 1.7),), smaller=((ONE, EAGER, 0.75),)),
    Case("wan2.2-5b", "1x48x2x16x16", "fp32", faster=((ONE, BEST, 2.3),)),
    Case("flux", "1x16x64x64", "fp32", (1, 2), faster=((ONE, BEST, 1.7),), smaller=((ONE, EAGER, 0.6),)),
    Case("flux", "1x16x64x64", "bf16", faster=((ONE, BEST, 1.3),), smaller=((ONE, EAGER, 0.6),)),
    Case("flux", "1x3x512x512", "fp32", call="encode", faster=((ONE, BEST, 1.5),)),
    Case("hunyuan-video-1.5", "1x32x3x16x16", "fp32", faster=((ONE, BEST, 1.5),)),
    Case("ltx-2", "1x128x3x16x16", "fp32", faster=((ONE, BEST, 1.5),)),
    Case("qwen-image-2.1", "1x64x1x32x32", "fp32", faster=((ONE, BEST, 1.5),)),
    Case("sana", "1x32x16x16", "fp32", faster=((ONE, BEST, 1.5),)),  # DC-AE
    Case("cogvideox", "1x16x3x32x32", "fp32", faster=((ONE, BEST, 1.5),)),
)  # fmt: skip


@dataclass
class Figures:
    """The figures of one contestant over its calls. Memory is in MiB."""

    seconds: list[float] = field(default_factory=list)
    peak: float = 0
    above_resting: float = 0
    error: float = 0
    warmup: float = 0

    @classmethod
    def of(cls, one: Contestant, reference: Tensor | None) -> Figures:
        """Return a contestant's figures. The error is the largest absolute difference from a reference."""
        assert one.frames is not None
        assert reference is not None
        return cls(
            [taken.seconds for taken in one.taken],
            one.memory("peak_reserved") / 2**20,
            one.memory("above_resting") / 2**20,
            (one.frames.float() - reference.float()).abs().max().item(),
            one.warmup_seconds,
        )


@dataclass(frozen=True)
class Peer:
    """SGLang's spatially sharded decode: a script that decodes `--latent` and prints a line of JSON."""

    script: Path
    python: str

    def decode(self, case: Case, into: Figures) -> None:
        """Decode once in new processes, warmed up on a crop."""
        command = [self.python, str(self.script), "--model", str(case.peer), "--mode", "spatial_shard"]
        command += ["--latent", case.shape, "--ranks", "2", "--threads", "1", "--reps", "1", "--smallwarm", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [done.stderr[-500:] or "nothing"]
        figures: dict[str, Any] = json.loads(lines[-1]) if lines[-1].startswith("{") else {"failed": lines[-1]}
        if figures.get("failed"):
            raise SystemExit(f"{self.script}: {figures}")
        into.seconds.append(figures["median_s"])
        into.peak = max(figures["peak_rss_mb_per_rank"])
        rests = zip(figures["peak_rss_mb_per_rank"], figures["rss_before_decode_mb"], strict=True)
        into.above_resting = max(peak - rest for peak, rest in rests)
        into.error = figures["max_abs_err"]


def measure(case: Case, repeat: int, peer: Peer | None, console: Console) -> dict[str, Figures]:
    """Let the contestants take turns, `repeat` times each, and return their figures."""
    shape = [int(extent) for extent in case.shape.split("x")]
    dtype = DTYPES[case.dtype]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1234)).to(dtype)
    x = x.clamp(-1, 1) if case.call == "encode" else x
    with TemporaryDirectory() as temporary, console.status("making the model") as status:
        random_vae(case.model).save_pretrained(temporary)
        model = Model(Path(temporary), families()[case.model].class_name, dtype, "cpu", call=case.call)
        eager = Contestant(EAGER, model, 1, case.threads, kind="diffusers")
        tried = [eager]
        tried += [
            Contestant(name, model, 1, case.threads, "diffusers", compiled, channels_last)
            for name, (channels_last, compiled) in WAYS.items()
        ]
        contestants = []
        for ranks in case.ranks:
            name = f"halovae, {ranks} rank{'s' * (ranks > 1)}"
            options = {"mode": "parallel", "gather": "rank0"}
            contestants.append(Contestant(name, model, ranks, case.threads, options=options))
        found: dict[str, Figures] = {}
        try:
            for one in list(tried):
                status.update(f"{case.title}: trying {one.name}")
                try:
                    one.warm_up(x)
                    for _ in range(TRIES):
                        one.decode(x, keep=True)
                except RankError as error:  # a module that cannot be compiled does not take part
                    console.print(f"{case.title}: {one.name} is left out: {str(error).strip().splitlines()[-1]}")
                    tried.remove(one)
            best = min(tried, key=lambda one: min(taken.seconds for taken in one.taken))
            for one in tried:
                found[one.name] = Figures.of(one, eager.frames)
                if one is not best:
                    one.close()
            best.taken.clear()
            contestants.insert(0, best)
            for one in contestants[1:]:
                status.update(f"{case.title}: warming up {one.name}")
                one.warm_up(x)
            if peer is not None and case.peer:
                found[SGLANG] = Figures()
            for turn in range(repeat):
                for one in contestants:
                    status.update(f"{case.title}: round {turn + 1} of {repeat}: {one.name}")
                    one.decode(x, keep=turn == repeat - 1)
                if peer is not None and case.peer:
                    status.update(f"{case.title}: round {turn + 1} of {repeat}: {SGLANG}")
                    peer.decode(case, found[SGLANG])
        finally:
            for one in (*tried, *contestants):
                one.close()
    for one in contestants:
        found[BEST if one is best else one.name] = Figures.of(one, eager.frames)
    return found


def report(console: Console, case: Case, found: dict[str, Figures]) -> None:
    """Print the table. Ratios of medians are against diffusers at its best, and against halovae's first row."""
    best, eager = found[BEST], found[EAGER]
    single = next(figures for name, figures in found.items() if name.startswith("halovae"))
    table = Table(title=f"{case.title}, {case.threads} thread(s) a rank", title_justify="left")
    for column in (
        "contestant", "median (s)", "all (s)", "speed / best", "speed / 1st halovae", "warm-up (s)",
        "peak (MiB)", "above resting (MiB)", "/ eager", "/ 1st halovae", "max error",
    ):  # fmt: skip
        table.add_column(column)
    for name, one in found.items():
        seconds = statistics.median(one.seconds)
        table.add_row(
            name,
            f"{seconds:.2f}",
            " ".join(f"{taken:.2f}" for taken in one.seconds),
            f"{statistics.median(best.seconds) / seconds:.2f}x",
            f"{statistics.median(single.seconds) / seconds:.2f}x",
            f"{one.warmup:.1f}",
            f"{one.peak:,.0f}",
            f"{one.above_resting:,.0f}",
            f"{one.above_resting / eager.above_resting:.2f}",
            f"{one.above_resting / single.above_resting:.2f}",
            f"{one.error:.1e}",
        )
    console.print(table)


def targets(case: Case, found: dict[str, Figures]) -> list[list[str]]:
    """Return rows of targets and what was reached, for the pairs that both took part."""
    lines = []
    for first, second, bound in case.faster:
        if first in found and second in found:
            reached = statistics.median(found[second].seconds) / statistics.median(found[first].seconds)
            verdict = "yes" if reached >= bound else "NO"
            lines.append([case.title, f"{first} against {second}", f">= {bound}x", f"{reached:.2f}x", verdict])
    for first, second, bound in case.smaller:
        if first in found and second in found:
            reached = found[first].above_resting / found[second].above_resting
            verdict = "yes" if reached <= bound else "NO"
            lines.append([case.title, f"memory, {first} / {second}", f"<= {bound}", f"{reached:.2f}", verdict])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="run all cases that have targets, instead of one")
    parser.add_argument("--only", choices=list(families()), nargs="+", help="with --all, only these models")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks for halovae")
    parser.add_argument("--model", choices=list(families()), default="wan2.1")
    parser.add_argument("--shape", default="1x16x3x32x32", help="BxCxTxHxW or BxCxHxW of the latents or pictures")
    parser.add_argument("--call", choices=get_args(Call), default="decode")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank and of diffusers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="folder with sglang_decode.py, for SGLang's rows")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has SGLang")
    args = parser.parse_args()
    peer = None if args.peers is None else Peer(args.peers / "sglang_decode.py", args.peers_python)
    one = Case(args.model, args.shape, args.dtype, tuple(args.ranks), args.threads, args.call)
    console = Console()
    console.width = max(console.width, 160)
    reached = []
    for case in ALL if args.all else (one,):
        if args.all and args.only and case.model not in args.only:
            continue
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
