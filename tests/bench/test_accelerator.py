"""`benchmarks/accelerator.py`: what it says without an accelerator, and every stage on the CPU with toys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halovae.device.kinds import Device

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=800)


@pytest.mark.skipif(Device.default().kind != "cpu", reason="there is an accelerator")
def test_without_an_accelerator_it_says_so_in_one_line_and_exits_with_2() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("no accelerator: torch finds none of cuda, npu, xpu, mps here.")
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(900)
def test_a_rehearsal_runs_every_stage_and_writes_the_whole_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("--rehearse", "--limit", "600", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["stages"]) == ["exactness", "anchors", "profile", "rates", "memory", "grids", "kernels"]
    for stage in results["stages"].values():
        assert stage["records"]
        assert (stage["left"], stage["ending"]) == ([], "")
        assert not any(isinstance(record.get("error"), str) for record in stage["records"])
    report = (tmp_path / "report.md").read_text()
    for text in (
        "No failures.",
        "diffusers, compiled, channels last",
        "| off by |",
        "aten::",
        "2 of 2",
        "a rank of 2x2",
        "upsampling into a window",
    ):
        assert text in report
    assert {path.name for path in tmp_path.glob("*.png")} == {"anchors.png", "memory.png"}
    assert not list(tmp_path.glob("*.part.json"))


def test_what_did_not_fit_into_a_limit_is_listed(tmp_path: Path) -> None:
    done = run("--rehearse", "--stage", "rates", "--limit", "0", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out for want of time, 10 cases:\n\n- copies\n" in (tmp_path / "report.md").read_text()
