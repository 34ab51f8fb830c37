"""Replicas on Ray: two nodes, one of which is lost while jobs run, and groups of ranks that Ray places."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving.clients import job_on_disk
from serving.server import Server

from halovae.io import media

STORE = 80 * 2**20  # bytes of each node's object store
NODE = {"num_cpus": 2, "object_store_memory": STORE, "node_ip_address": "127.0.0.1"}
# Ray on loopback alone; and no process is ended for what others take of the memory.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_memory_monitor_refresh_ms": "0"
}  # fmt: skip


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of two CPUs each."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.add_node(**NODE)
    yield made
    made.shutdown()


def until(condition: Callable[[], bool], server: Server, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)


def states(server: Server) -> list[str]:
    try:
        return [one["state"] for one in httpx.get(f"{server.url}/health", timeout=30).json()["replicas"]]
    except httpx.TransportError:
        return []


def ranks() -> list[psutil.Process]:
    """The processes of ranks that Ray has started on this machine."""
    return [one for one in psutil.process_iter(["cmdline"]) if "RankActor" in " ".join(one.info["cmdline"] or ())]


def test_replicas_come_and_go_and_a_lost_node_loses_and_doubles_no_job(
    cluster: Any, models: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--replicas", "1:2", "--replica-idle", "5", "--ray-address", cluster.address, "--decode-batch", "1")
    with Server(models("wan2.1"), tmp_path / "out", *options, ranks=2) as server:
        until(lambda: states(server) == ["ready"], server)
        videos = [server.submit(num_inference_steps=30, seed=1) for _ in range(24)]
        until(lambda: states(server) == ["ready", "ready"], server)
        until(lambda: all(one["jobs"] for one in httpx.get(f"{server.url}/health").json()["replicas"]), server)
        running = [video for video in videos if server.video(video)["status"] != "completed"]
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        assert [server.ended(video)["status"] for video in videos] == ["completed"] * 24
        assert running  # when the node was lost
        jobs = [job_on_disk(tmp_path / "out", video) for video in videos]
        assert not any(job.alone or job.interrupted.keys() - {"host"} for job in jobs)
        assert 24 <= sum(job.attempts for job in jobs) <= 28
        assert 'halovae_jobs_completed_total{kind="video"} 24.0' in httpx.get(f"{server.url}/metrics").text
        first, *others = (media.read_clip(tmp_path / f"out/results/{video}-0.mp4")[0].int() for video in videos)
        assert first.shape == (3, 5, 48, 64)
        # Most are equal. Where one value in a thousand differs by 1, x264 decides differently.
        assert max((one - first).abs().float().mean().item() for one in others) <= 2
        until(lambda: states(server) == ["ready"], server)  # nothing is left to do
        cluster.add_node(**NODE)
        assert server.ended(server.submit())["status"] == "completed"
        assert server.stop(signal.SIGTERM) == 0
    deadline = time.monotonic() + 30
    while ranks():
        assert time.monotonic() < deadline
        time.sleep(0.2)


GROUP = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from halovae.distributed.ray_cluster import RankGroup, connect, device_of, resources
from halovae.distributed.transport import join_world

def add(folder, stays):
    join_world(torch.device("cpu"))
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    Path(folder, str(dist.get_rank())).write_text(str(total.item()))
    if stays:
        time.sleep(600)

def run(ranks, interface, folder, stays):
    Path(folder).mkdir(parents=True)
    group, seen = RankGroup(ranks, device_of(resources()), interface, {}, add, folder, stays), []
    while (state := group.advance()) != "ended":
        seen += [state] if state not in (*seen, 'placing') else []
        if stays and len([*Path(folder).iterdir()]) == ranks:
            import ray
            ray.kill(group._actors[1])
            stays = False
        time.sleep(0.1)
    print(seen, [one.read_text() for one in sorted(Path(folder).iterdir())], group.reason, group.lost_host)

if __name__ == "__main__":
    connect(sys.argv[1])
    run(2, None, sys.argv[2] + "/2", False)
    run(3, "lo", sys.argv[2] + "/3", True)
    try:
        run(3, None, sys.argv[2] + "/wide", False)
    except ValueError as error:
        print(error)
"""


def test_ray_places_groups_on_one_node_or_on_several(cluster: Any, tmp_path: Path) -> None:
    """Both nodes have one address, so that ranks of several nodes meet as those of one host do."""
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    done = subprocess.run(
        [sys.executable, str(script), cluster.address, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two, three, wide = done.stdout.splitlines()
    assert two == "['starting', 'running'] ['3.0', '3.0'] a rank returned False"
    assert three.startswith("['starting', 'running'] ['6.0', '6.0', '6.0'] The actor is dead because")
    assert three.endswith(" False")
    assert wide.startswith("--num-gpus 3: no host of the cluster has devices for more than 2 ranks.")
