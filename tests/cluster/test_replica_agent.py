"""The agent of replicas: when it starts ranks again, and when it gives up."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest
import zmq
from serving.stub_ranks import rank_settings

from halovae.cli import serve_checks
from halovae.distributed.ray_cluster import RankGroup, State
from halovae.serving import channel, replica_agent, replica_supervisor
from halovae.serving.channel import RemoteLink
from halovae.serving.replica_agent import (
    NO_CLUSTER,
    Changed,
    End,
    GiveUp,
    Joined,
    Keeper,
    Wish,
    forget_secrets,
    variables,
)
from halovae.serving.replica_supervisor import ReplicaSupervisor
from halovae.serving.replicas import Replica
from halovae.serving.settings import ReplicaSettings
from halovae.serving.supervisor import GAVE_UP, RanksLost


@dataclass
class Group:
    """Ranks of which the test says what becomes of them."""

    state: State = "placing"
    reason: str = ""
    host: str = "a-host"
    lost_host: bool = False
    wants: str = "1 x CPU"

    def advance(self) -> State:
        return self.state

    def end(self, reason: str) -> None:
        self.state, self.reason = "ended", reason

    def lose(self, reason: str, host: bool = False) -> None:
        self.lost_host = host
        self.end(reason)


@dataclass
class Kept:
    """A keeper, its clock, the groups that it started, and what it told the front."""

    now: float = 0.0
    groups: dict[str, list[Group]] = field(default_factory=dict)
    told: list[Changed] = field(default_factory=list)
    refused: str = ""
    have_been_ready: bool = False

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.start, self.told.append, self.have_been_ready, lambda: self.now)

    def start(self, name: str) -> tuple[RankGroup, float]:
        if self.refused:
            raise ValueError(self.refused)
        self.groups.setdefault(name, []).append(Group())
        return cast(RankGroup, self.groups[name][-1]), self.now

    def wish(self, names: str, ready: str = "") -> None:
        self.keeper.take(Wish(frozenset(names), frozenset(ready)))
        self.keeper.advance()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.keeper.advance()

    def lose_again(self, name: str, times: int) -> None:
        """Let a replica's ranks end so many times, and wait until the next ones are started."""
        for _ in range(times):
            self.groups[name][-1].lose("out of memory")
            self.keeper.advance()
            self.after(replica_agent._LONGEST + 1)

    @property
    def starts(self) -> dict[str, int]:
        return {name: len(groups) for name, groups in self.groups.items()}


def ready(names: str = "01") -> Kept:
    """Replicas that have been running for an hour."""
    kept = Kept()
    kept.wish(names)
    for name in names:
        kept.groups[name][0].state = "running"
    kept.after(3600)
    kept.wish(names, names)
    kept.told.clear()
    return kept


def test_all_replicas_that_are_wanted_are_started_and_told() -> None:
    kept = Kept()
    kept.wish("012")
    assert kept.starts == {"0": 1, "1": 1, "2": 1}
    kept.groups["1"][0].state = "starting"
    kept.keeper.advance()
    assert kept.told == [*(Changed(name, "placing") for name in "012"), Changed("1", "starting", "a-host")]


def test_ranks_of_a_lost_host_are_placed_elsewhere_at_once() -> None:
    kept = ready()
    kept.groups["1"][0].lose("its host was lost", host=True)
    kept.after(0.2)
    kept.after(0.2)
    assert kept.starts == {"0": 1, "1": 2}
    assert kept.told == [
        Changed("1", "ended", "a-host", "its host was lost", True),
        Changed("1", "placing", since=kept.now),
    ]


def test_ranks_that_end_are_started_after_a_pause() -> None:
    kept = ready()
    kept.groups["0"][0].lose("a rank ended")
    kept.after(0.1)
    kept.after(0.1)
    assert kept.starts == {"0": 1, "1": 1}
    kept.after(0.2)
    assert kept.starts == {"0": 2, "1": 1}


def test_the_first_ranks_that_end_before_they_are_ready_are_given_up() -> None:
    kept = Kept()
    kept.wish("01")
    kept.groups["1"][0].lose("ValueError: no such model")
    with pytest.raises(GiveUp, match="no such model"):
        kept.keeper.advance()


def test_ranks_of_an_agent_that_was_restarted_are_tried_again() -> None:
    """Its cluster has just come back: ranks that cannot load at once need not be in vain."""
    kept = Kept(have_been_ready=True)
    kept.wish("0")
    kept.lose_again("0", 4)
    assert kept.starts == {"0": 5}
    with pytest.raises(GiveUp, match="out of memory"):
        kept.lose_again("0", 1)


def test_a_host_that_is_lost_while_ranks_load_gives_nothing_up() -> None:
    kept = Kept()
    kept.wish("0")
    kept.groups["0"][0].lose("its host was lost", host=True)
    kept.after(0.2)
    kept.after(0.2)
    assert kept.starts == {"0": 2}


def test_a_replica_that_cannot_start_is_tried_for_as_long_as_others_work() -> None:
    kept = ready()
    kept.wish("01", "0")
    kept.lose_again("1", 8)
    assert kept.starts == {"0": 1, "1": 9}
    kept.wish("01", "")
    with pytest.raises(GiveUp, match="out of memory"):
        kept.lose_again("1", 8)


def test_replicas_that_are_not_wanted_any_more_are_ended() -> None:
    kept = ready()
    kept.wish("0", "0")
    assert kept.groups["1"][0].state == "ended"
    assert kept.told == [Changed("1", "ended")]
    kept.after(3600)
    assert kept.starts == {"0": 1, "1": 1}
    kept.wish("01", "0")
    assert kept.starts == {"0": 1, "1": 2}


def test_the_front_ends_ranks_that_others_follow() -> None:
    kept = ready()
    kept.keeper.take(End("0", "no progress"))
    kept.keeper.take(End("7", "of a replica that is gone"))
    kept.after(0.1)
    kept.after(1.0)
    assert kept.starts == {"0": 2, "1": 1}
    assert kept.told[0] == Changed("0", "ended", "a-host", "no progress")


def test_hosts_that_are_too_small_are_waited_for_and_at_the_start_not_for_ever() -> None:
    kept = Kept(refused="--num-gpus 16: too wide")
    kept.wish("0")
    assert kept.told == [Changed("0", "placing", reason="--num-gpus 16: too wide")]
    kept.after(replica_agent._COMING)  # such as a pod's, which takes minutes
    with pytest.raises(GiveUp, match="too wide"):
        kept.after(replica_agent._SOON)
    kept = Kept(refused="--num-gpus 16: too wide")
    kept.wish("0")
    kept.refused = ""
    kept.after(replica_agent._SOON)
    assert kept.starts == {"0": 1}
    kept = ready("0")
    kept.refused = "--num-gpus 16: too wide"
    kept.groups["0"][0].lose("its host was lost", host=True)
    kept.after(0.1)
    kept.after(0.1)
    assert kept.told[-1] == Changed("0", "ended", "", "--num-gpus 16: too wide", True)
    kept.refused = ""
    kept.after(replica_agent._LONGEST + 1)
    assert kept.starts == {"0": 2}


def test_ranks_get_no_secrets() -> None:
    environment: dict[str, Any] = {
        "HALOVAE_API_KEY": "k",
        "HALOVAE_WEBHOOK_SECRET": "s",
        "HALOVAE_TIMEOUT": "9",
        "X": "1",
    }
    assert variables(environment) == {"HALOVAE_TIMEOUT": "9"}


def test_processes_of_ray_inherit_no_secrets() -> None:
    environment = {serve_checks.KEY: "k", serve_checks.WEBHOOK_SECRET: "s", "PATH": "/bin"}
    forget_secrets(environment)
    assert environment == {"PATH": "/bin"}


# The front's side, over agents that the test plays.

Life = Callable[[Connection, ReplicaSupervisor], int]  # what an agent does; returns its exit code


def unjoined(front: Connection, _: ReplicaSupervisor) -> int:
    front.send("--ray-address auto: Ray cannot be used: no cluster")
    return NO_CLUSTER


def joined(front: Connection, _: ReplicaSupervisor) -> int:
    """Join, and crash."""
    front.send(Joined("127.0.0.1", "CPU"))
    return 1


def working(front: Connection, supervisor: ReplicaSupervisor) -> int:
    """Join, have ranks that are ready, and crash."""
    front.send(Joined("127.0.0.1", "CPU"))
    front.send(Changed("0", "running", "a-host"))
    supervisor.replicas["0"].is_ready = True
    return 1


def vain(front: Connection, _: ReplicaSupervisor) -> int:
    front.send(Joined("127.0.0.1", "CPU"))
    front.send("ValueError: no model")
    return GAVE_UP


def run_agents(
    lives: list[Life], model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[str], list[bool]]:
    """Run a supervisor over agents with these lives.

    Returns:
        why it ended, the replicas whose ranks were lost, and what each agent was told: whether ranks were ready before
    """
    lost: list[str] = []
    had_ready: list[bool] = []

    class Agent:
        exitcode: int | None = None
        alive = 2  # turns of the supervisor's loop that are left

        def __init__(self, target: object, args: tuple[Any, ...], name: str) -> None:
            self.front = args[2]
            had_ready.append(args[3])

        def start(self) -> None:
            self.exitcode = lives.pop(0)(self.front, supervisor)

        def is_alive(self) -> bool:
            self.alive -= 1
            return self.alive > 0

    async def lose(replica: Replica) -> None:
        lost.append(f"{replica.name} {replica.cause}")
        replica.lose()

    async def run() -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        supervisor.open(socket, lose)
        try:
            await supervisor.run()
        finally:
            socket.close(0)

    supervisor = ReplicaSupervisor(ReplicaSettings(1, 1, 1, str(model)), rank_settings(model, output))
    monkeypatch.setattr(supervisor._context, "Process", Agent)
    for module, name, value in ((replica_supervisor, "_CHECK", 0.0), (replica_supervisor, "_LONGEST", 0.0)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("halovae.serving.supervisor._PAUSES", (0.0, 0.0))
    with pytest.raises(RanksLost) as given_up:
        asyncio.run(run())
    assert not lives
    return str(given_up.value), lost, had_ready


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("wan2.1")


def test_a_rank_0_that_connects_again_is_heard_before_the_loss_is_noticed(model: Path, tmp_path: Path) -> None:
    async def lose(replica: Replica) -> None:
        raise AssertionError

    async def opened() -> ReplicaSupervisor:
        supervisor = ReplicaSupervisor(ReplicaSettings(1, 1, 1, str(model)), rank_settings(model, tmp_path))
        supervisor.open(front, lose)
        return supervisor

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.ROUTER) as front, context.socket(zmq.DEALER) as first, context.socket(zmq.DEALER) as again:
        supervisor = asyncio.run(opened())
        link = RemoteLink(supervisor._listen("127.0.0.1"), supervisor.token, supervisor._public, "0", 1.0)
        for number, rank in enumerate((first, again)):
            rank.linger, rank.identity = 0, b"rank 0"
            link.secure(rank)
            assert rank.get(zmq.HEARTBEAT_IVL) == front.get(zmq.HEARTBEAT_IVL) == channel._PROBE
            rank.connect(link.endpoint)
            rank.send(str(number).encode())
            assert front.poll(5000)
            assert front.recv_multipart() == [b"rank 0", str(number).encode()]


@pytest.mark.parametrize(
    ("lives", "reason", "losses"),
    [
        ([unjoined], "--ray-address auto: Ray cannot be used: no cluster", 1),
        ([vain], "ValueError: no model", 1),
        ([joined], "Ray ended the agent, exit status 1", 1),
        ([working, unjoined, unjoined, unjoined, working, vain], "ValueError: no model", 6),  # the cluster came back
    ],
)
def test_a_cluster_that_was_there_is_waited_for_and_all_else_is_given_up(
    lives: list[Life], reason: str, losses: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, lost, had_ready = run_agents([*lives], model, tmp_path, monkeypatch)
    assert (given_up, lost) == (reason, ["0 host"] * losses)
    assert had_ready == [False, *(working in lives[:count] for count in range(1, len(lives)))]
