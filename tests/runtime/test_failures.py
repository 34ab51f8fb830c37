"""What happens when something breaks in the middle: all ranks end, the reason is shown, nothing is half-written."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import latents, vae

import halovae
from halovae import Grid
from halovae.distributed.launch import _cause, launch
from halovae.distributed.mesh import mesh_for
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import wait_limit
from halovae.errors import RankError
from halovae.io import latents as latents_file

LIMIT_S = 10
LONG = {"frames": 300, "height": 24, "width": 24}  # recorded within seconds, decoded within minutes


def fails_on_rank_1() -> None:
    """Ends rank 1 in the middle of a decode that rank 0 cannot finish alone."""
    decoder = halovae.load(vae("wan2.1"))
    for count, _ in enumerate(decoder.stream(latents("wan2.1", frames=8), grid=Grid(rows=2))):
        if count == 2 and torch.distributed.get_rank() == 1:
            raise ArithmeticError("made to fail after three chunks")


def test_a_failing_ranks_traceback_is_shown() -> None:
    with pytest.raises(RankError) as caught:
        launch(2, fails_on_rank_1)
    message = str(caught.value)
    assert message.startswith("rank 1 failed")
    assert "in fails_on_rank_1" in message
    assert "ArithmeticError: made to fail after three chunks" in message


def test_a_lost_connection_is_not_the_cause() -> None:
    failures: Any = {
        0: SimpleNamespace(message={"message": "RuntimeError: Connection closed by peer [127.0.0.1]:1"}, timestamp=7),
        1: SimpleNamespace(message={"message": "ArithmeticError: made to fail"}, timestamp=7),
        2: SimpleNamespace(message="Signal 9 (SIGKILL) received by PID 1", timestamp=8),
    }
    assert _cause(failures)[0] == 1


def rank_of_world() -> tuple[int, int]:
    decoder = halovae.load(vae("wan2.1"))
    decoder.decode(latents("wan2.1", frames=1))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def test_launch_returns_what_each_rank_returned() -> None:
    before = dict(os.environ)
    assert launch(2, rank_of_world) == [(0, 2), (1, 2)]
    assert dict(os.environ) == before


def waits_for_rank_0() -> None:
    mesh = mesh_for(Grid(rows=2), torch.device("cpu"))
    if mesh.rank == 0:
        time.sleep(LIMIT_S)
    else:
        mesh.transport.all_values(1)


def test_a_rank_waits_for_another_as_long_as_it_is_told() -> None:
    with (
        Ranks(2, variables={"HALOVAE_TIMEOUT": "1"}) as group,
        pytest.raises(RankError, match="rank 1 failed") as caught,
    ):
        group.run(waits_for_rank_0)
    assert re.search(r"timed? ?out", str(caught.value), re.IGNORECASE), str(caught.value)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_a_timeout_is_a_number_above_0(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HALOVAE_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"HALOVAE_TIMEOUT={text}: expected seconds, a number above 0"):
        wait_limit()


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A decode command that takes far longer than any test waits."""
    vae("wan2.1").save_pretrained(tmp_path / "vae")
    latents_file.save(tmp_path / "long.safetensors", latents("wan2.1", **LONG), "wan2.1", scaled=False, fps=16)
    return [
        *(sys.executable, "-m", "halovae.cli.main", "decode", str(tmp_path / "long.safetensors"), "--mode", "parallel"),
        *("--model", str(tmp_path / "vae"), "--num-gpus", "2", "-o", str(tmp_path / "out.mp4")),
    ]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of the started ranks, once both of them decode."""
    assert isinstance(process.args, list)
    output = Path(str(process.args[-1]))
    for _ in range(600):
        found = []
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                command = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if int(fields[1]) == process.pid and b"spawn_main" in command:
                found.append(int(entry.name))
        if len(found) == 2 and list(output.parent.glob(".*.partial")):
            return sorted(found)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def started(command: list[str]) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ranks = ranks_of(process)
    time.sleep(1)
    return process, ranks


def ended(process: subprocess.Popen[str], ranks: list[int], folder: Path) -> str:
    """What the command said; it and its ranks must be gone in time, and nothing written."""
    try:
        _, said = process.communicate(timeout=LIMIT_S)
        assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert sorted(path.name for path in folder.iterdir()) == ["long.safetensors", "vae"]
    return said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all(endless: list[str], tmp_path: Path, victim: int) -> None:
    process, ranks = started(endless)
    os.kill(ranks[victim], signal.SIGKILL)
    said = ended(process, ranks, tmp_path)
    assert process.returncode == 1
    assert "failed, and all ranks were ended" in said
    assert "Signal 9 (SIGKILL)" in said or "Connection" in said


def test_ctrl_c_ends_all_and_leaves_nothing(endless: list[str], tmp_path: Path) -> None:
    process, ranks = started(endless)
    os.killpg(process.pid, signal.SIGINT)
    said = ended(process, ranks, tmp_path)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in said
    assert "Traceback" not in said


def test_ctrl_c_on_one_rank(endless: list[str], tmp_path: Path) -> None:
    command = [word if word != "2" else "1" for word in endless]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if list(tmp_path.glob(".*.partial")):
            break
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    said = ended(process, [], tmp_path)
    assert process.returncode == 130
    assert "Traceback" not in said


RANKS_THAT_DECODE_ON = """
import os, sys, time
from halovae.distributed.ranks import Ranks
from test_failures import decode_for_long
if __name__ == "__main__":
    Ranks(2).run(decode_for_long, sys.argv[1])
"""


def decode_for_long(folder: str) -> None:
    decoder = halovae.load(vae("wan2.1"))
    Path(folder, str(os.getpid())).touch()
    decoder.decode(latents("wan2.1", **LONG), grid=Grid(rows=2))


def test_ranks_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(RANKS_THAT_DECODE_ON)
    (tmp_path / "ranks").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    main = subprocess.Popen([sys.executable, str(script), str(tmp_path / "ranks")], env=environment)
    try:
        wait_for(lambda: len(list((tmp_path / "ranks").iterdir())) == 2, 60)
    finally:
        main.kill()
        main.wait()
    pids = [int(path.name) for path in (tmp_path / "ranks").iterdir()]
    wait_for(lambda: not any(alive(pid) for pid in pids), LIMIT_S)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)
