"""Datasets on Ray: two nodes, one of which is lost, drivers that are killed, and what listens meanwhile."""

import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster.here import lines_of, make_clip, pictures_of

import halovae
from halovae.io import latents as latents_file

SIZES = [(16 + 8 * (number % 4), 16 + 8 * (number // 4)) for number in range(12)]
LENGTHS = (1, 5, 9)
STORE = 128 * 2**20  # bytes of each node's object store


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of two CPUs each, on loopback."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=2, object_store_memory=STORE)
    yield made
    made.shutdown()


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start `halovae dataset ...` in a process of its own."""
    command = [sys.executable, "-m", "halovae.cli.main", "dataset", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    return said


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def count(out: Path) -> int:
    path = out / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_bad(folder: Path) -> set[str]:
    """Write six inputs that cannot be encoded. Returns their names."""
    whole = (folder / "clip000.mp4").read_bytes()
    (folder / "bad-truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "bad-empty.mp4").write_bytes(b"")
    (folder / "bad-text.mov").write_text("no video")
    (folder / "bad-picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    make_clip(folder / "bad-tiny.mp4", 5, 6, 6)
    (folder / "bad-zero.webm").write_bytes(b"\0" * 100)
    return {path.name for path in folder.glob("bad-*")}


def test_a_lost_node_and_a_killed_driver_lose_and_double_nothing(cluster: Any, tmp_path: Path, wan: Path) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    names = {f"clip{number:03d}.mp4" for number in range(194)}
    for number, name in enumerate(sorted(names)):
        width, height = SIZES[number % 12]
        make_clip(clips / name, LENGTHS[number // 12 % 3], width, height, seed=number)
    bad = write_bad(clips)
    assert len(bad) == 6
    command = ("encode", clips, "-o", out, "--model", wan, "--ray-address", cluster.address)

    first = start(*command)
    wait_until(lambda: count(out) >= 40, first)
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    wait_until(lambda: count(out) >= 100, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = count(out)
    assert 100 <= done < 194

    said = finish(start(*command, "--verify"))
    assert "verified: 194 samples" in said
    lines = lines_of(out)
    assert sorted(line["name"] for line in lines) == sorted(names)
    assert {line["name"] for line in lines[:done]} & {line["name"] for line in lines[done:]} == set()
    assert {path.name for path in out.rglob("*.safetensors")} == {f"{name}.00000.safetensors" for name in names}
    rejected = lines_of(out, "rejected.jsonl")
    assert sorted(line["name"] for line in rejected) == sorted(bad)
    assert all(line["reason"] for line in rejected)

    vae, worst = halovae.load(wan), 0.0
    for name in sorted(names):
        moments = vae.encode(pictures_of(clips / name))
        assert moments is not None
        found = latents_file.read(out / f"{name}.00000.safetensors")
        worst = max(worst, (found - moments[:, : moments.shape[1] // 2]).abs().max().item())
    assert worst <= 1e-5


def test_without_a_cluster_a_run_listens_on_loopback_only_and_goes_on(tmp_path: Path, wan: Path) -> None:
    for number in range(4):
        make_clip(tmp_path / f"in/{number}.mp4", 10, 24, 16, seed=number)
    (tmp_path / "in/bad.mp4").write_text("bad")
    command = (
        "encode",
        tmp_path / "in",
        "-o",
        tmp_path / "out",
        "--model",
        wan,
        "--format",
        "parquet",
        "--frames",
        "5",
    )
    process, seen = start(*command), set()

    def look() -> bool:
        try:
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return True
        for one in psutil.net_connections("tcp"):
            if one.pid in family and one.status == psutil.CONN_LISTEN and one.laddr:
                seen.add(one.laddr.ip)
        return count(tmp_path / "out") == 8 or process.poll() is not None

    wait_until(look, process)
    said = finish(process)
    assert "8 samples (8 new), 1 rejected" in " ".join(said.split())
    parsed = [ipaddress.ip_address(one) for one in seen]
    assert parsed
    assert all((getattr(one, "ipv4_mapped", None) or one).is_loopback for one in parsed), seen
    again = finish(start(*command, "--format", "parquet", "--verify"))
    assert "8 samples (0 new), 1 rejected" in " ".join(again.split())
    assert "verified: 8 samples" in again


def test_too_many_rejections_end_a_run(tmp_path: Path, wan: Path) -> None:
    for number in range(5):
        (tmp_path / f"in{number}.mp4").write_text("bad")
    process = start("encode", tmp_path, "-o", tmp_path / "out", "--model", wan, "--max-rejected", "40%")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "of 5 inputs are rejected, more than 2: rejected.jsonl has the reasons" in " ".join(said.split())


def test_encode_is_for_map_batches(wan: Path) -> None:
    """In a process of its own: Ray's state is global."""
    script = f"""
import numpy as np, ray
from halovae.cluster.run import connect
import halovae.ray
connect(None)
frames = [np.random.default_rng(n).integers(0, 256, (1 + 4 * (n % 2), 16, 24, 3), np.uint8) for n in range(6)]
ds = ray.data.from_items([{{"frames": one, "id": n}} for n, one in enumerate(frames)])
ds = ds.map_batches(halovae.ray.Encode, fn_constructor_kwargs={{"model": {str(wan)!r}, "ranks": 2}}, batch_size=3,
                    compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5)
rows = {{row["id"]: row["latents"] for row in ds.iter_rows()}}
one = halovae.ray.Encode({str(wan)!r})({{"frames": frames}})["latents"]
print(max(float(np.abs(rows[n] - one[n]).max()) for n in range(6)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) <= 1e-4
