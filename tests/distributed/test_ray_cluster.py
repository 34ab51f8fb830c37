"""Groups of ranks on Ray: where ranks are put, how they meet, and what is said of those that ended."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from halovae.distributed.ray_cluster import (
    RankActor,
    Seat,
    address_of,
    connect,
    device_of,
    environments,
    process_folder,
    said,
    strategy_of,
)

HOSTS = {name for name, found in psutil.net_if_addrs().items() if any(one.family.name == "AF_INET" for one in found)}
SHARED = sorted(name for name in HOSTS if address_of(name) != "127.0.0.1")  # interfaces other than loopback


def seat(host: str, *gpus: int, **others: Any) -> Seat:
    return Seat(f"node of {host}", host, {"GPU": [str(one) for one in gpus], **others}, host)


def test_a_rank_takes_a_device_where_there_are_some() -> None:
    assert device_of({"CPU": 8, "GPU": 2}) == "GPU"
    assert device_of({"CPU": 8, "NPU": 16, "memory": 1e9}) == "NPU"
    assert device_of({"CPU": 8, "GPU": 0}) == "CPU"


def test_a_group_spans_hosts_only_if_none_is_large_enough() -> None:
    assert strategy_of(8, [8, 4], None) == "STRICT_PACK"
    assert strategy_of(1, [0], None) == "STRICT_PACK"
    assert strategy_of(4, [], None) == "STRICT_PACK"  # of hosts that are still to come
    assert strategy_of(16, [8, 8], "eth1") == "PACK"
    with pytest.raises(ValueError, match="--num-gpus 16: no host .* more than 8 ranks. .* needs --interface"):
        strategy_of(16, [8, 8], None)


def test_ranks_know_their_place_and_see_the_devices_of_their_host() -> None:
    made = environments([seat("a", 2), seat("b", 0), seat("a", 3), seat("b", 1)])
    assert [(one["RANK"], one["LOCAL_RANK"], one["CUDA_VISIBLE_DEVICES"]) for one in made] == [
        ("0", "0", "2,3"), ("1", "0", "0,1"), ("2", "1", "2,3"), ("3", "1", "0,1")
    ]  # fmt: skip
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in made} == {("4", "2")}
    (ascend,) = environments([seat("a", NPU=["5"])])
    assert ascend["ASCEND_RT_VISIBLE_DEVICES"] == "5"
    assert "CUDA_VISIBLE_DEVICES" not in ascend
    assert "CUDA_VISIBLE_DEVICES" not in environments([seat("a")])[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ray::RankActor.run()\n  File ...\nValueError: no model\n", "ValueError: no model"),
        ("The actor died.\n\tpid: 1\nThe actor is dead because its node has died. Node Id: 1\n\tthe rest",
         "The actor is dead because its node has died. Node Id: 1"),
        ("", "a rank ended"),
        ("x" * 900, "x" * 500),
    ],
)  # fmt: skip
def test_what_matters_of_a_message_is_its_cause(message: str, expected: str) -> None:
    assert said(message) == expected


def test_an_interface_is_named_with_those_that_a_host_has() -> None:
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(ValueError, match="eth77: .* has no such network interface .* here: .*lo"):
        address_of("eth77")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1 "),
        ("127.0.0.1:port", "127.0.0.1:port: expected auto, HOST, or HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_at_once(address: str, words: str) -> None:
    with pytest.raises(ConnectionError, match=words):
        connect(address)


def test_folders_of_processes_that_ended_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left, other = tmp_path / f"halovae-rank-{done.pid}-abc", tmp_path / "halovae-rank-notes"
    other.mkdir()
    left.mkdir()
    (left / "store").write_text("")
    first = process_folder()
    assert first.stat().st_mode & 0o077 == 0
    second = process_folder()
    assert {*tmp_path.iterdir()} == {first, second, other}


def test_folders_of_other_users_neither_stop_a_start_nor_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    strange = {tmp_path / f"halovae-rank-{name}" for name in ("1x-y", f"{2**80}-y", "²-y")}
    for folder in strange:
        folder.mkdir()
    first = process_folder()
    assert {*tmp_path.iterdir()} == {first, *strange}
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left = tmp_path / f"halovae-rank-{done.pid}-abc"
    left.mkdir()
    with monkeypatch.context() as changed:
        changed.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
        second = process_folder()
    assert left.exists()
    third = process_folder()
    assert {*tmp_path.iterdir()} == {first, second, third, *strange}


RANK = """
import json, sys, torch, torch.distributed as dist
from halovae.distributed.ray_cluster import RankActor
from halovae.distributed.transport import join_world
place, meeting, interface = json.loads(sys.argv[1])
def work(factor):
    join_world(torch.device("cpu"))
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    print(factor * total.item(), flush=True)
    dist.destroy_process_group()
RankActor().run(place, meeting, interface, work, [10])
"""


@pytest.mark.skipif(not SHARED, reason="there is no network interface but loopback")
@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]], ids=["one host", "two hosts"])
def test_ranks_meet_in_a_file_or_on_the_interface_that_is_named(
    hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hosts are this one. Ranks of different ones meet over the network as if they were apart."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    interface = None if hosts == ["a", "a"] else SHARED[0]
    meeting = RankActor().meeting(interface or "lo")
    clean = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps([place, meeting, interface])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean,
        )
        for place in environments([seat(host) for host in hosts])
    ]  # fmt: skip
    said_ = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said_
    assert all("30.0" in text for text in said_)
