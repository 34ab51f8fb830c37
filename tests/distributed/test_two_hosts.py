"""`halovae serve` on two hosts: network namespaces of this machine, with a rank each, that share only a cable."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import psutil
import pytest

from halovae.pipelines import tiny

FIRST = "10.77.0.1"


class Host:
    """A network namespace with one interface, `wire`."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def curl(self, path: str, *words: str) -> bytes:
        done = self.popen("curl", "-s", f"http://{FIRST}:8080{path}", *words, stdout=subprocess.PIPE)
        return done.communicate(timeout=60)[0]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two, connected; the first has the address `FIRST`."""
    for needed in ("ip", "curl"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    pair = [Host(f"halovae-{os.getpid()}-{index}", f"10.77.0.{index + 1}") for index in range(2)]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip(*f"link add wire netns {pair[0].name} type veth peer name wire netns {pair[1].name}".split())
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "wire")
                for interface in ("wire", "lo"):
                    ip("-n", host.name, "link", "set", interface, "up")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here (as root?): {error}")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def begin(
    hosts: list[Host], model: Path, home: Path, *options: str, interface: str = "wire"
) -> list[subprocess.Popen[bytes]]:
    """torchrun on each host, with a folder of its own there."""
    environment = {"GLOO_SOCKET_IFNAME": interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = []
    for index, host in enumerate(hosts):
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{FIRST}:29400"]
        words += [option.format(index=index, address=host.address, host=index == 0) for option in options]
        words += ["-m", "halovae.cli.main", "serve", "--model-path", str(model), "--sp-degree", "2", "--dtype", "fp32"]
        words += ["--port", "8080", "--host", "0.0.0.0", "--no-auth", "--output-dir", str(home / str(index))]
        with (home / f"{index}.log").open("w") as log:
            agents.append(
                host.popen(
                    sys.executable, "-m", "torch.distributed.run", *words,
                    stdout=log, stderr=log, env={**os.environ, **environment},
                )
            )  # fmt: skip
    return agents


def ended(client: Host, video: str) -> dict[str, Any]:
    while True:
        shown: dict[str, Any] = json.loads(client.curl(f"/v1/videos/{video}"))
        if shown["status"] in ("completed", "failed"):
            return shown
        time.sleep(0.1)


def is_ready(client: Host) -> bool:
    return b'"ready"' in client.curl("/health")


def check_a_video(client: Host, agents: list[subprocess.Popen[bytes]], home: Path) -> None:
    """Once the ranks work, one that is asked for by the other host is made."""
    while not is_ready(client):
        assert all(agent.poll() is None for agent in agents), [log.read_text() for log in home.glob("*.log")]
        time.sleep(0.2)
    body = json.dumps({"prompt": "a cat", "size": "64x48", "num_frames": 5, "num_inference_steps": 2})
    made = client.curl("/v1/videos", "-H", "Content-Type: application/json", "-d", body)
    shown = ended(client, json.loads(made)["id"])
    assert shown["status"] == "completed", shown
    file = home / "video.mp4"
    client.curl(f"/v1/videos/{shown['id']}/content", "-o", str(file))
    with av.open(str(file)) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(64, 48)] * 5


def kill_rank(agent: subprocess.Popen[bytes]) -> None:
    (rank,) = psutil.Process(agent.pid).children()
    rank.kill()


def end(agents: list[subprocess.Popen[bytes]]) -> None:
    for agent in agents:
        agent.terminate()
    for agent in agents:
        agent.wait(60)


def test_a_video_is_served_and_all_end_when_a_host_loses_its_rank(hosts: list[Host], tmp_path: Path) -> None:
    tiny.make_model("wan2.1", tmp_path / "model")
    agents = begin(hosts, tmp_path / "model", tmp_path, "--node-rank={index}")
    try:
        check_a_video(hosts[1], agents, tmp_path)
        kill_rank(agents[1])
        assert [agent.wait(60) for agent in agents] == [1, 1]
        while b"status" in hosts[0].curl("/health"):  # until the front has noticed
            time.sleep(0.1)
    finally:
        end(agents)
    assert not (tmp_path / "1" / "jobs.sqlite").exists()  # the second host had no front


def test_without_a_named_interface_no_rank_starts(hosts: list[Host], tmp_path: Path) -> None:
    tiny.make_model("wan2.1", tmp_path / "model")
    agents = begin(hosts, tmp_path / "model", tmp_path, "--node-rank={index}", interface="")
    try:
        assert [agent.wait(120) for agent in agents] == [1, 1]
    finally:
        end(agents)
    for log, speaker in ("0.log", ""), ("1.log", "rank 1: "):
        said = " ".join((tmp_path / log).read_text().split())
        assert f"Error: {speaker}GLOO_SOCKET_IFNAME=: the ranks span hosts" in said
        assert "here: wire." in said


@pytest.mark.slow
def test_agents_that_meet_by_c10d_begin_the_ranks_anew(hosts: list[Host], tmp_path: Path) -> None:
    tiny.make_model("wan2.1", tmp_path / "model")
    options = ["--rdzv-backend=c10d", "--rdzv-id=serve", "--local-addr={address}", "--max-restarts=3"]
    options.append("--rdzv-conf=is_host={host}")  # which agents find out by host names elsewhere: these share one
    agents = begin(hosts, tmp_path / "model", tmp_path, *options)
    try:
        check_a_video(hosts[1], agents, tmp_path)
        kill_rank(agents[1])
        while is_ready(hosts[1]):
            time.sleep(0.1)
        check_a_video(hosts[1], agents, tmp_path)
    finally:
        end(agents)
