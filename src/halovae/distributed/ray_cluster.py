"""Ray: join a cluster, and start groups of ranks on it. Nothing of Ray is imported before `connect` is called."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from halovae.device.kinds import RANK_ENVIRONMENT
from halovae.distributed.launch import use_interface
from halovae.distributed.transport import meet_in_file

State = Literal["placing", "starting", "running", "ended"]
# Resources of Ray that are devices, and the variable by which their driver shows a process some of them.
_DEVICES = {"GPU": "CUDA_VISIBLE_DEVICES", "NPU": "ASCEND_RT_VISIBLE_DEVICES"}
_PREFIX = "halovae-rank-"
_FOLDER = re.compile(rf"{_PREFIX}([0-9]{{1,7}})-.*")  # with the number of a process
_PORT = 6379  # of Ray's head, where an address names none
_REACH = 10.0  # seconds for a cluster to answer
_MOST = 500  # characters of a reason
_VERDICT = 5.0  # seconds for Ray to say what became of a rank that cannot be reached


def connect(address: str | None) -> None:
    """Start Ray on this host, on loopback, or join a cluster.

    Args:
        address: of a cluster: HOST, HOST:PORT, or "auto"; None for `RAY_ADDRESS`, or this host alone.

    Raises:
        ConnectionError: no cluster is there.
    """
    if address not in (None, "auto") and "://" not in str(address):
        address = _listening(str(address))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its log files have the rest
    alone = address is None and "RAY_ADDRESS" not in os.environ
    if alone:  # Ray's own switch for "one host only": all its ports are then on loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # of 40 s each, to reach a cluster that is gone
    import ray

    if ray.is_initialized():
        return
    if alone:
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def _listening(address: str) -> str:
    """Return HOST:PORT of an address where something listens. Ray itself tries for minutes before it says so."""
    if address.count(":") > 1:  # of IPv6
        return address
    host, _, port = address.partition(":")
    number = int(port) if port.isdigit() else _PORT
    if port and not port.isdigit():
        raise ConnectionError(f"{address}: expected auto, HOST, or HOST:PORT")
    try:
        socket.create_connection((host, number), timeout=_REACH).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {host}:{number} ({error})") from error
    return f"{host}:{number}"


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this host.

    Raises:
        ValueError: this host has no such interface, or it has no such address.
    """
    present = psutil.net_if_addrs()
    for address in present.get(interface, ()):
        if address.family == socket.AF_INET:
            return address.address
    with_address = [name for name, all_ in present.items() if any(one.family == socket.AF_INET for one in all_)]
    raise ValueError(
        f"{interface}: {socket.gethostname()} has no such network interface with an IPv4 address; "
        f"here: {', '.join(sorted(with_address))}"
    )


def own_address() -> str:
    """The address by which Ray's other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


def resources() -> dict[str, float]:
    """All resources of the cluster."""
    import ray

    return dict(ray.cluster_resources())


def process_folder() -> Path:
    """A folder for this process alone, which only this user may enter. Those of processes that ended are removed.

    Ray ends its processes without notice, so that they cannot remove their own.
    """
    home = Path(tempfile.gettempdir())
    for left in home.glob(f"{_PREFIX}*"):
        process = _FOLDER.fullmatch(left.name)  # any user may make folders of any name here
        with suppress(FileNotFoundError):  # another process has just removed it
            if process and left.lstat().st_uid == os.getuid() and not psutil.pid_exists(int(process[1])):
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def device_of(cluster: Mapping[str, float]) -> str:
    """The resource that one rank takes in a cluster with these resources: "GPU", "NPU", or else "CPU"."""
    return next((name for name in _DEVICES if cluster.get(name, 0) >= 1), "CPU")


def strategy_of(ranks: int, hosts: Sequence[float], interface: str | None) -> str:
    """Ray's strategy for a group: all ranks on one host, or on few hosts if none is large enough.

    Args:
        ranks: of the group.
        hosts: how many ranks each host of the cluster has devices for.
        interface: the network interface that hosts share; None if none was named.

    Raises:
        ValueError: the group spans hosts, and no interface was named.
    """
    if ranks == 1 or not hosts or ranks <= max(hosts):
        return "STRICT_PACK"
    if interface is None:
        raise ValueError(
            f"--num-gpus {ranks}: no host of the cluster has devices for more than {max(hosts):g} ranks. A group that "
            "spans hosts needs --interface, the network interface that they share"
        )
    return "PACK"


class Seat(NamedTuple):
    """Where Ray has put a rank.

    Attributes:
        node: Ray's id of the node.
        host: the node's address; ranks with the same one are on one host.
        devices: Ray's numbers of the rank's devices, by resource.
        name: the host's name.
    """

    node: str
    host: str
    devices: Mapping[str, Sequence[str]]
    name: str


def environments(seats: Sequence[Seat]) -> list[dict[str, str]]:
    """The environment of each rank: its place as torchrun would set it, and the devices of its host's ranks.

    Ranks of one host see each other's devices, as communication libraries expect it: the local rank tells them apart.
    """
    size, count = len(seats), Counter(seat.host for seat in seats)
    before: Counter[str] = Counter()
    made = []
    for rank, seat in enumerate(seats):
        local, before[seat.host] = before[seat.host], before[seat.host] + 1
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count[seat.host]}
        devices = {
            variable: ",".join(one for other in seats if other.host == seat.host for one in other.devices[name])
            for name, variable in _DEVICES.items()
            if seat.devices.get(name)
        }
        made.append({**{name: str(value) for name, value in place.items()}, **devices})
    return made


class RankActor:
    """One rank, as an actor of Ray. Its methods are called in this order."""

    def seat(self) -> Seat:
        """Say where this is."""
        import ray

        context = ray.get_runtime_context()
        return Seat(context.get_node_id(), own_address(), context.get_accelerator_ids(), socket.gethostname())

    def meeting(self, interface: str | None) -> tuple[str, int, str]:
        """Where the ranks meet, if this is rank 0: an address and port here, and a file for ranks of this host."""
        address = own_address() if interface is None else address_of(interface)
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        return address, port, str(process_folder() / "store")

    def run(
        self, place: Mapping[str, str], meeting: tuple[str, int, str], interface: str | None,
        function: Callable[..., Any], arguments: Sequence[Any],
    ) -> None:  # fmt: skip
        """Call a function as a rank. Devices must not have been used in this process before."""
        if place["WORLD_SIZE"] != "1":
            os.environ.update(place)
            if place["LOCAL_WORLD_SIZE"] == place["WORLD_SIZE"]:
                meet_in_file(Path(meeting[2]))
            else:
                os.environ.update(MASTER_ADDR=meeting[0], MASTER_PORT=str(meeting[1]))
                if interface is not None:
                    use_interface(interface)
        function(*arguments)


class RankGroup:
    """Ranks that Ray places and supervises: actors in one placement group, for as long as all of them live.

    Args:
        ranks: how many.
        device: the resource that each takes, as of `device_of`.
        interface: the network interface that ranks of several hosts use; None if they are on one host.
        variables: of the ranks' environment, besides what Ray sets.
        function: each rank calls `function(*arguments)`; both must be picklable.

    Attributes:
        state: "placing" while Ray looks for devices, "starting", "running" once the function is called, "ended".
        reason: why it ended.
        lost_host: whether it ended because a node did.
        host: the name of rank 0's host, once it is known.

    Raises:
        ValueError: the group spans hosts, and no interface was named.
    """

    def __init__(
        self, ranks: int, device: str, interface: str | None, variables: Mapping[str, str],
        function: Callable[..., Any], *arguments: Any,
    ) -> None:  # fmt: skip
        import ray

        hosts = [node["Resources"].get(device, 0.0) for node in ray.nodes() if node["Alive"]]
        self._ranks, self._device, self._interface, self._work = ranks, device, interface, (function, arguments)
        self._variables = {**RANK_ENVIRONMENT, **variables}
        self._group = ray.util.placement_group(
            [{self._device: 1.0}] * ranks, strategy=strategy_of(ranks, hosts, interface)
        )
        self.state: State = "placing"
        self.reason, self.host, self.lost_host = "", "", False
        self._actors: list[Any] = []
        self._seats: list[Seat] = []
        self._seating: list[Any] = []
        self._meeting: Any = None
        self._runs: list[Any] = []
        self._verdict: Any = None  # on a rank that cannot be reached
        self._verdict_until = 0.0

    @property
    def wants(self) -> str:
        """What the group asks of Ray, in words."""
        return f"{self._ranks} x {self._device}"

    def advance(self) -> State:
        """Go on as far as that takes no waiting, and return the state."""
        import ray

        try:
            if self._verdict is not None:
                self._judge()
            elif self.state == "placing" and ray.util.placement_group_table(self._group)["state"] == "CREATED":
                self._start()
            elif self.state == "starting" and self._have_answered([*self._seating, self._meeting]):
                self._run()
            elif self.state == "running":
                for ended in ray.wait(self._runs, num_returns=1, timeout=0)[0]:
                    ray.get(ended)
                    self.end("a rank returned")
        except ray.exceptions.ActorUnavailableError:  # of a lost host, or of a process that has just ended
            self._ask()
        except ray.exceptions.RayError as error:
            self._fail(error)
        return self.state

    def _judge(self) -> None:
        """End the group once it is known what became of the rank that cannot be reached."""
        import ray

        if ray.wait([self._verdict], timeout=0)[0]:
            ray.get(self._verdict)
            self.end("a rank returned")
        elif time.monotonic() > self._verdict_until:
            self.lost_host = True
            self.end(f"its host {self.host} cannot be reached")

    def _ask(self) -> None:
        """Ask Ray what became of a rank that cannot be reached."""
        if self._verdict is None:
            self._verdict_until = time.monotonic() + _VERDICT
        unreached = [one for one, run in zip(self._actors, self._runs or self._seating, strict=True) if _failed(run)]
        self._verdict = (unreached or self._actors)[0].seat.remote()

    def _start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(RankActor)
        asked = {"CPU": {"num_cpus": 1}, "GPU": {"num_cpus": 0, "num_gpus": 1}}
        options = asked.get(self._device, {"num_cpus": 0, "resources": {self._device: 1}})
        self._actors = [
            actor.options(
                **options, max_restarts=0, runtime_env={"env_vars": self._variables},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            ).remote()
            for bundle in range(self._ranks)
        ]  # fmt: skip
        self._seating = [one.seat.remote() for one in self._actors]
        self._meeting = self._actors[0].meeting.remote(self._interface)
        self.state = "starting"

    def _have_answered(self, calls: Sequence[Any]) -> bool:
        """Whether all calls have returned.

        Raises:
            RayError: one of them failed, or its actor ended.
        """
        import ray

        done, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        ray.get(done)
        return not waiting

    def _run(self) -> None:
        import ray

        self._seats = ray.get(self._seating)
        self.host = self._seats[0].name
        function, arguments = self._work
        self._runs = [
            one.run.remote(place, self._meeting, self._interface, function, arguments)
            for one, place in zip(self._actors, environments(self._seats), strict=True)
        ]
        self.state = "running"

    def _fail(self, error: Exception) -> None:
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.lost_host = any(seat.node not in alive for seat in self._seats) or "node has died" in str(error)
        self.end(f"its host {self.host} was lost" if self.lost_host else said(str(error)))

    def end(self, reason: str) -> None:
        """End all ranks at once, and give their devices back."""
        import ray

        self.state, self.reason, self._verdict = "ended", reason, None
        for one in self._actors:
            ray.kill(one)
        ray.util.remove_placement_group(self._group)


def _failed(call: Any) -> bool:
    """Whether a call has failed."""
    import ray

    if not ray.wait([call], timeout=0)[0]:
        return False
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return True
    return False


def said(message: str) -> str:
    """What matters of a message of Ray: the last line, which has the error of a rank or says why its process ended."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith("The actor is dead because")), None)
    return (cause or (lines[-1] if lines else "a rank ended"))[:_MOST]
