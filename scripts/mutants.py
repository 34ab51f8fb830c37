"""Break the core in one place at a time, and show that the fast tests fail.

    python scripts/mutants.py [NAME ...]

Each mutant is a copy of the project with one changed expression. The tests listed for it run until one fails. The exit
status is 1 if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds for the tests of one mutant; a mutant that hangs counts as noticed


class Mutant(NamedTuple):
    """A change, and the tests that should fail.

    Attributes:
        file: path within `src/halovae`.
        before: an expression that occurs once in the file.
        after: the expression that replaces it.
        tests: paths within `tests`, separated by spaces.
    """

    file: str
    before: str
    after: str
    tests: str


MUTANTS = {
    "a halo of the row before the last": Mutant(
        "plane/rings.py", "(end - width, end))", "(end - width - 1, end - 1))", "plane/test_row_blocks.py"
    ),
    "neighbors swapped": Mutant(
        "plane/rings.py", "(ring.narrow(dim, 0, 1), ring.narrow(dim, last, 1)),",
        "(ring.narrow(dim, last, 1), ring.narrow(dim, 0, 1)),", "plane/test_row_blocks.py",
    ),
    "an edge reflected as if it were repeated": Mutant(
        "plane/row_blocks.py", 'edges[0] == "replicate" else 2', 'edges[0] == "replicate" else 1',
        "plane/test_row_blocks.py",
    ),
    "frames of zeros that are not written": Mutant(
        "plane/row_blocks.py", "out[:, :, frames].zero_()", "out[:, :, frames]", "plane/test_row_blocks.py"
    ),
    "a stale cache": Mutant(
        "plane/windows.py", "inner[:, :, depth - keep.shape[2] :]", "inner[:, :, : keep.shape[2]]",
        "plane/test_row_blocks.py plane/passes",
    ),
    "variance without that of the means": Mutant(
        "plane/moments.py", "torch.addcmul(variances, deviation, deviation)", "variances",
        "plane/test_norms.py kernels/test_kernels.py",
    ),
    "attention to the rank's own keys": Mutant(
        "plane/rules/attention.py", "[one.ndim - 2, one.ndim - 1]) for one in (k, v))",
        "[one.ndim - 1]) for one in (k, v))", "plane/test_operators.py",
    ),
    "a buffer that is used once more": Mutant(
        "plane/passes/in_place.py", "last[root(x)] is not node or", "", "plane/passes"
    ),
    "kernels that not all ranks have": Mutant(
        "plane/sharded.py", "compiled() if all(have_kernels)", "compiled() if any(have_kernels)",
        "kernels/test_kernels.py",
    ),
    "a budget without its margin": Mutant(
        "planning/decision.py", "self.peak * (1 + MARGIN) <= budget", "self.peak <= 2 * budget",
        "planning/test_plan_graphs.py planning/test_plan.py",
    ),
    "colors cut off, not rounded": Mutant(
        "runtime/options.py", ".mul_(127.5).round_()", ".mul_(127.5)", "runtime/test_decode.py"
    ),
    "padding of the last rank left out": Mutant(
        "plane/operators.py", "(max(bounds[-1], a), b - max(bounds[-1], a))", "(max(bounds[-1], a), 0)",
        "plane/test_operators.py",
    ),
}  # fmt: skip


def main() -> None:
    """Try all mutants, or the named ones."""
    console, table = Console(), Table(title="mutants", title_justify="left")
    for column in ("mutant", "noticed by", "seconds"):
        table.add_column(column)
    survivors = 0
    for name in sys.argv[1:] or MUTANTS:
        with console.status(name):
            begin = time.monotonic()
            noticed = _noticed(MUTANTS[name])
        survivors += noticed is None
        table.add_row(name, noticed or "[red]no test", f"{time.monotonic() - begin:.0f}")
    console.print(table)
    sys.exit(int(survivors > 0))


def _noticed(mutant: Mutant) -> str | None:
    """Return the first test that fails, or that time is up; None if all pass."""
    with TemporaryDirectory(prefix="halovae-mutant-") as folder:
        for name in ("src", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        path = Path(folder, "src", "halovae", mutant.file)
        text = path.read_text()
        if text.count(mutant.before) != 1:
            raise SystemExit(f"{mutant.file}: {mutant.before!r} occurs {text.count(mutant.before)} times, not once")
        path.write_text(text.replace(mutant.before, mutant.after))
        tests = [f"tests/{one}" for one in mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(Path(folder, "src"))}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"timeout: {LIMIT} s"
        if done.returncode == 0:
            return None
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].removeprefix("tests/") if failed else f"pytest, with exit status {done.returncode}"


if __name__ == "__main__":
    main()
