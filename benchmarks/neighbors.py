"""Run halovae's plane, DTensor, and PhysicsNeMo's ShardTensor on the same operators and VAEs: docs/neighbors.md.

    python -m venv /tmp/neighbors && /tmp/neighbors/bin/pip install -r benchmarks/neighbors.txt
    python benchmarks/neighbors.py --python /tmp/neighbors/bin/python

Without `--python`, ShardTensor is not run. Ranks are gloo processes on a CPU, one process group at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

WORKER = Path(__file__).with_name("neighbors_worker.py")
NAMES = {"halovae": "halovae", "dtensor": "DTensor", "shardtensor": "ShardTensor"}
KINDS = {
    "right": "right, partitioned",
    "replicated": "right, replicated",
    "wrong": "silently wrong",
    "raises": "raises",
    "hangs": "hangs",
    "cuda": "needs CUDA",
}


@dataclass
class Run:
    """One system in one environment.

    Attributes:
        system: its name in `neighbors_worker.py`.
        python: the environment's interpreter.
        versions: versions of packages; empty until the system ran.
        found: outcomes by case and grid.
    """

    system: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    found: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{NAMES[self.system]}, torch {self.versions['torch'].split('+')[0]}"

    def start(self, args: argparse.Namespace, console: Console) -> None:
        """Run the system on all cases and grids.

        Raises:
            RuntimeError: the environment lacks something.
        """
        command = [self.python, str(WORKER), self.system, "--grids", *args.grids, "--only", args.only]
        command += ["--timeout", str(args.timeout)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if args.quiet else None,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                outcome = json.loads(line)
                if "versions" in outcome:
                    self.versions = outcome["versions"]
                    continue
                self.found[outcome["case"], outcome["grid"]] = outcome
                console.print(f"{self.name}, {outcome['grid']}, {outcome['case']}: {kind(outcome)}", highlight=False)
        if process.returncode:
            raise RuntimeError(f"{self.python} {WORKER.name} {self.system}: exit status {process.returncode}")


def kind(outcome: dict[str, Any]) -> str:
    """Return the key in `KINDS` of an outcome."""
    for key, name in (("raised", "raises"), ("hangs", "hangs"), ("needs_cuda", "cuda")):
        if outcome.get(key):
            return name
    if outcome["labeled"] != outcome["expected"] or outcome["error"] is None:
        return "wrong"
    # Rounding of fp32 or bf16 as plain torch has it, or of sums in another order.
    if not outcome["error"] <= max(8 * outcome["plain"], 1e-6 * outcome["largest"]):
        return "wrong"
    return "replicated" if outcome["replicated"] else "right"


def size(count: int) -> str:
    return f"{count / 1024:.1f} KiB"


def cell(outcome: dict[str, Any] | None, notes: list[str], system: str) -> str:
    """Return an outcome in a few words. The message of an error is added to the notes."""
    if outcome is None:
        return "not run"
    found = kind(outcome)
    if found == "raises":
        note = f"{NAMES[system]}: `{outcome['raised'].replace('`', '')}`"
        if note not in notes:
            notes.append(note)
        return f"raises [{notes.index(note) + 1}]" + (", some ranks hang" if outcome["some_hang"] else "")
    if found in ("hangs", "cuda"):
        return KINDS[found]
    if found == "wrong":
        if outcome["error"] is None:
            parts = ["x".join(map(str, outcome[key][-2:])) for key in ("full", "labeled")]
            return f"**wrong**: {parts[0]} labeled {parts[1]}"
        return f"**wrong**: {outcome['error']:.0e}"
    return f"{outcome['error']:.0e}, {'replicated, ' if found == 'replicated' else ''}{size(outcome['received'])}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(cases: dict[str, list[str]], grids: int) -> str:
    """Return the cases, each with its grids unless these are all `grids`."""
    return "; ".join(name if len(on) == grids else f"{name} ({', '.join(on)})" for name, on in cases.items())


def where(run: Run, wanted: Any) -> dict[str, list[str]]:
    """Return the cases and their grids for which `wanted` is true."""
    cases: dict[str, list[str]] = {}
    for (case, grid), outcome in run.found.items():
        if wanted(case, grid, outcome):
            cases.setdefault(case, []).append(grid)
    return cases


def seen(runs: list[Run], grids: int) -> str:
    """Return sentences about the tables, computed from the numbers."""
    own, *others = runs
    right = ("right", "replicated")

    def better(case: str, grid: str, outcome: dict[str, Any]) -> bool:
        mine = own.found.get((case, grid))
        return mine is not None and kind(outcome) in right and kind(mine) not in right

    def cheaper(case: str, grid: str, outcome: dict[str, Any]) -> bool:
        mine = own.found.get((case, grid))
        return (
            mine is not None and kind(outcome) == kind(mine) == "right" and bool(outcome["received"] < mine["received"])
        )

    def silent(case: str, grid: str, outcome: dict[str, Any]) -> bool:
        return kind(outcome) == "wrong"

    def hanging(case: str, grid: str, outcome: dict[str, Any]) -> bool:
        return kind(outcome) == "hangs"

    lines: dict[tuple[str, str], list[str]] = {}
    for name, condition, some in (
        ("Silently wrong", silent, runs),
        ("Hangs", hanging, runs),
        ("Right where halovae is not", better, others),
        ("Right and partitioned as halovae, fewer bytes received", cheaper, others),
    ):
        for run in some:
            cases = where(run, condition)
            if cases:
                lines.setdefault((name, listed(cases, grids)), []).append(run.name)
    return "\n".join(f"- **{name}: {', '.join(names)}.** {cases}." for (name, cases), names in lines.items())


def agreement(runs: list[Run]) -> float:
    """Return how far the environments' references differ: the difference of their sums over the largest value."""
    sums: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for key, outcome in run.found.items():
            if "sum" in outcome:
                sums.setdefault(key, []).append(outcome["sum"] / max(outcome["largest"], 1e-30))
    return max((max(one) - min(one) for one in sums.values()), default=0.0)


def page(runs: list[Run], args: argparse.Namespace) -> str:
    """Return the text of docs/neighbors.md."""
    shown = [run for run in runs if run.versions]
    cases = list(dict.fromkeys(case for run in shown for case, _ in run.found))
    notes: list[str] = []
    columns = ["case", "plain torch", *(run.name if run.versions else f"{NAMES[run.system]}" for run in runs)]
    tables = []
    for grid in args.grids:
        rows = []
        for case in cases:
            outcomes = [run.found.get((case, grid)) for run in runs]
            plain = next((f"{one['plain']:.0e}" for one in outcomes if one and "plain" in one), "-")
            rows.append(
                [case, plain, *(cell(one, notes, run.system) for one, run in zip(outcomes, runs, strict=True))]
            )  # fmt: skip
        tables.append(f"## {grid}\n\n{table(columns, rows)}")
    counts = [(run, Counter(map(kind, run.found.values()))) for run in shown]
    summary = table(
        ["system", *KINDS.values()], [[run.name, *(str(count[one]) for one in KINDS)] for run, count in counts]
    )
    versions = [f"halovae {runs[0].versions['halovae']}", f"diffusers {runs[0].versions['diffusers']}"]
    versions += [f"PhysicsNeMo {run.versions['nvidia-physicsnemo']}" for run in shown if run.system == "shardtensor"]
    command = f"python benchmarks/neighbors.py{' --python PYTHON' if args.python else ''}"
    numbered = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    difference = agreement(shown)
    agreeing = f"agree to {difference:.0e}" if difference else "are the same"
    return f"""# Neighbors

Written by `{command}`, {datetime.date.today()}: {", ".join(versions)},
Python {platform.python_version()}; torch as in the tables. Do not edit it.

Two other tensors know that they are partitioned: torch's DTensor, and ShardTensor of NVIDIA PhysicsNeMo. This page runs
them and halovae's [plane](plane.md) on the same operators and tiny VAEs, on the same seeded inputs and weights. Ranks
are gloo processes on a CPU. PhysicsNeMo has an environment of its own (`benchmarks/neighbors.txt`), with another torch;
DTensor runs in both.

## What is seen

Calls by outcome, on all grids:

{summary}

{seen(shown, len(args.grids))}

Read these with care:

- The plane partitions pictures for inference, and does nothing else. The cases are what VAEs need.
- DTensor is part of torch. It is made for sharded weights and tensor parallelism; partitioning pictures is not its
  purpose. It gathers where it has no better way, which is right where it happens.
- ShardTensor is made for training on NVIDIA GPUs. It also partitions point clouds, meshes, neighbor searches, and
  neighborhood attention, and combines with FSDP. halovae has none of that. On a CPU its operators are registered by an
  explicit call, as here. Its attention needs CUDA, so some calls are not judged.
- DTensor and ShardTensor support gradients; halovae refuses them. `halovae.shard` also refuses a function whose result
  is neither a multiple nor a divisor of its input's plane, such as padding on its own.
- Before each call halovae compares the arguments of all ranks. The bytes of nearest upsampling are this comparison
  alone. It outweighs the halos of a small operator; in a decode it is small.
- Nothing here ran on an accelerator, and no time is measured.

{chr(10).join(f"{one}{chr(10)}" for one in tables)}
- **A number**: the largest absolute error of any rank against plain torch in one process in fp64, on the same inputs.
  The second column is plain torch's own error in the dtype of the case: fp32, or bf16 where the case says so. The
  references of all environments {agreeing}.
- **replicated**: right, but each rank holds all of the result.
- **KiB**: all that all ranks received over TCP in a second call, by the kernel's counters. The input's distribution and
  the collection of the result are not part of it.
- **wrong**: no error was raised, but the values are wrong, or the whole result has another shape than its label says.
- **raises**: a rank raised the numbered message below.
- **hangs**: not done after {args.timeout:.0f} seconds, and again not after {2 * args.timeout:.0f}.
- **needs CUDA**: the operator cannot run on a CPU.
- Models have tiny configurations and random weights.

## Messages

{numbered}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of an environment with PhysicsNeMo and diffusers")
    parser.add_argument("--grids", nargs="+", default=["2x1", "1x2", "2x2"])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one case (default 30)")
    parser.add_argument("--output", type=Path, default=Path("docs/neighbors.md"))
    parser.add_argument("--quiet", action="store_true", help="hide what the systems print")
    args = parser.parse_args()
    console = Console(stderr=True)
    runs = [Run("halovae", sys.executable), Run("dtensor", sys.executable)]
    if args.python:
        runs += [Run("dtensor", args.python), Run("shardtensor", args.python)]
    for run in runs:
        run.start(args, console)
    if not args.python:
        runs.append(Run("shardtensor", ""))
    args.output.write_text(page(runs, args))
    console.print(str(args.output))


if __name__ == "__main__":
    main()
