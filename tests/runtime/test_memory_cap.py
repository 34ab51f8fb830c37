"""A decode in a process that may take no more than its plan says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def decoded(way: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("capped.py")), way]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SETTINGS}, timeout=250)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mapped memory on Linux only")
def test_strips_decode_within_their_plan_and_a_decode_at_once_does_not() -> None:
    done = decoded("strips")
    assert done.returncode == 0, done.stderr
    assert "decoded (1, 3, 1, 1024, 1280)" in done.stdout
    failed = decoded("once")
    assert failed.returncode != 0
    assert "can't allocate memory" in failed.stderr
