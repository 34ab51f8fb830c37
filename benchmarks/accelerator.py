"""Measure an accelerator in ten minutes: `make gpu`, or

    python benchmarks/accelerator.py [--stage exactness anchors ...] [-o DIR]

Stages run one after the other, the most valuable first, each in a process of its own with a time limit:

    exactness   every family at small sizes against the plain module in fp64: fp32 without TF32, and bf16
    anchors     clips and pictures that others published times of, beside diffusers, with peak memory
    profile     operators of the two main cases by time
    rates       the device's copies, matrix products, and convolutions
    memory      peaks that recorded graphs predict, and measured ones
    grids       one rank of larger grids by itself, also as a CUDA graph
    kernels     each Triton kernel beside the same by PyTorch's operators, and compiled

`results-DEVICE/` gets `report.md`, `results.json`, and plots, written anew after each stage. Cases that did not fit
into a limit are listed. `--rehearse` runs the code of every stage on the CPU, with models and sizes of toys.

Exits with 2 without an accelerator, and with 1 if a case failed or was not exact.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In a rehearsal Triton's interpreter stands for its compiler. Triton asks when it is imported.
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import accelerator_report
import accelerator_stages
import torch

from halovae.device.kinds import ACCELERATORS, Device

LIMITS = {"exactness": 120, "anchors": 220, "profile": 60, "rates": 40, "memory": 50, "grids": 50, "kernels": 40}
"""Seconds for each stage."""
_GRACE = 30  # seconds that a case may take beyond a stage's limit
Results = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--limit", type=float, help="seconds for each stage, instead of its own limit")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with toys")
    parser.add_argument("-o", "--output", type=Path, help="folder of the results; results-DEVICE if not given")
    parser.add_argument("--run", choices=list(LIMITS), help=argparse.SUPPRESS)  # a stage's own process
    args = parser.parse_args()
    device = Device(torch.device("cpu")) if args.rehearse else Device.default()
    if device.kind == "cpu" and not args.rehearse:
        print(
            f"no accelerator: torch finds none of {', '.join(ACCELERATORS)} here. `--rehearse` runs the stages on the "
            "CPU, and benchmarks/scaling.py measures it",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.run is not None:
        accelerator_stages.run(args.run, device, args.rehearse, args.output, time.monotonic() + args.limit)
        return
    described = device.describe()
    name = re.sub(r"[^A-Za-z0-9]+", "-", described["device"]).strip("-").lower()
    folder = args.output or Path(f"results-{'rehearsal' if args.rehearse else name}")
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {
        "device": described, "date": time.strftime("%Y-%m-%d"), "rehearsal": args.rehearse, "stages": {},
    }  # fmt: skip
    for stage in args.stage:
        limit = LIMITS[stage] if args.limit is None else args.limit
        print(f"{stage}: at most {limit:.0f} s", flush=True)
        results["stages"][stage] = _staged(stage, limit, folder, args.rehearse)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        accelerator_report.write(results, folder)
    print(f"{folder / 'report.md'}, results.json, and plots")
    sys.exit(1 if accelerator_report.failures(results) else 0)


def _staged(stage: str, limit: float, folder: Path, rehearse: bool) -> Results:
    """Run a stage in a process of its own, and return what it found up to its end or limit."""
    part = folder / f"{stage}.part.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--run", stage, "--limit", str(limit), "-o", str(part)]
    begin, ending = time.monotonic(), ""
    if rehearse and stage != "exactness":  # one process is enough to rehearse processes: each imports for seconds
        accelerator_stages.run(stage, Device(torch.device("cpu")), True, part, begin + limit)
    else:
        try:
            done = subprocess.run([*command, *["--rehearse"][: int(rehearse)]], timeout=limit + _GRACE)
            if done.returncode:
                ending = f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            ending = "its process was stopped at the limit"
    found: Results = {"cases": [], "records": []}
    if part.exists():
        found = json.loads(part.read_text())
        part.unlink()
    reached = {record["case"] for record in found["records"]}
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "limit": limit,
        "ending": ending,
        "records": found["records"],
        "left": [case for case in found["cases"] if case not in reached],
    }


if __name__ == "__main__":
    main()
