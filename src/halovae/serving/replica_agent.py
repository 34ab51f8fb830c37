"""The agent of replicas: a process that has Ray place groups of ranks, and watches them. The front has no Ray in it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NamedTuple

from halovae.distributed import ray_cluster
from halovae.distributed.launch import end_with_parent
from halovae.distributed.ray_cluster import RankGroup, State
from halovae.pipelines.specs import find_pipeline
from halovae.serving import logs
from halovae.serving.channel import RemoteLink
from halovae.serving.engine import serve_as_rank
from halovae.serving.settings import RankSettings, ReplicaSettings
from halovae.serving.supervisor import GAVE_UP, Backoff

log = logging.getLogger(__name__)
NO_CLUSTER = 4  # the exit code of an agent that cannot join the cluster
_CHECK = 0.2  # seconds between two checks
_LONGEST = 30.0  # seconds until ranks that were not ready are started again, while others are
_SOON = 5.0  # seconds until it is looked again for hosts that have not joined yet
_COMING = 600.0  # seconds from the start for which hosts that are large enough may still join the cluster
_SCARCE = 30.0  # seconds without room after which the log says what is missing
# Variables of the front that ranks get. None of them holds a secret: Ray shows them.
_PASSED = ("HALOVAE_CACHE", "HALOVAE_CALIBRATION", "HALOVAE_GRAPHS", "HALOVAE_PASSES", "HALOVAE_TIMEOUT")

_SECRETS = ("HALOVAE_API_KEY", "HALOVAE_WEBHOOK_SECRET")  # which the front needs, and no process of Ray


class Joined(NamedTuple):
    """The agent has joined a cluster, whose hosts reach this one by `address`, and where a rank takes a `device`."""

    address: str
    device: str


class Changed(NamedTuple):
    """A replica's ranks have changed their state, as of `RankGroup`. They started at `since`; 0.0 for none."""

    name: str
    state: State
    host: str = ""
    reason: str = ""
    lost_host: bool = False
    since: float = 0.0


class Door(NamedTuple):
    """How ranks reach the front: an endpoint, its token, and its public key. Earlier ranks began by `since`."""

    endpoint: str
    token: str
    key: bytes
    since: float


class Wish(NamedTuple):
    """What the front wants: the names of all replicas that there are to be, and which of them are ready."""

    names: frozenset[str]
    ready: frozenset[str]


class End(NamedTuple):
    """The front wants the ranks of a replica to be replaced by others."""

    name: str
    reason: str


class GiveUp(Exception):
    """Another start would fail too. The message says why."""


@dataclass
class _Kept:
    """A replica that is kept running: its present ranks, or when the next ones start."""

    backoff: Backoff
    group: RankGroup | None = None
    since: float = 0.0
    state: State = "ended"
    began: float = 0.0
    next_start: float = 0.0
    says_scarce: bool = True


class Keeper:
    """Keeps replicas running, as far as that takes no waiting.

    Args:
        start: starts the ranks of a replica by its name. Returns them, and when they started, as the front knows it.
        tell: called with what changed.
        have_been_ready: whether ranks of an earlier keeper were ready. The first ones must be: the next start would
            fail too.
        clock: the time, in seconds.
    """

    def __init__(
        self, start: Callable[[str], tuple[RankGroup, float]], tell: Callable[[Changed], object],
        have_been_ready: bool = False, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._start, self._tell, self._clock = start, tell, clock
        self._kept: dict[str, _Kept] = {}
        self._ready: frozenset[str] = frozenset()
        self._have_been_ready, self._began = have_been_ready, clock()

    def take(self, message: Wish | End) -> None:
        """Do what the front wants."""
        if isinstance(message, End):
            kept = self._kept.get(message.name)
            if kept is not None and kept.group is not None and kept.state != "ended":
                kept.group.end(message.reason)
            return
        self._ready = message.ready
        self._have_been_ready = self._have_been_ready or bool(message.ready)
        for name in self._kept.keys() - message.names:
            kept = self._kept.pop(name)
            if kept.group is not None:
                kept.group.end("it is not needed any more")
            self._tell(Changed(name, "ended", since=kept.since))
        for name in sorted(message.names - self._kept.keys(), key=int):
            self._kept[name] = _Kept(Backoff(True))

    def advance(self) -> None:
        """Look after all replicas.

        Raises:
            GiveUp: ranks ended before they were ready, and none ever were; or hosts are too small, and no others came.
        """
        for name, kept in self._kept.items():
            now = self._clock()
            if kept.group is None:
                if now >= kept.next_start:
                    self._begin(name, kept, now)
                continue
            state = kept.group.advance()
            if state == "placing" and kept.says_scarce and now - kept.began > _SCARCE:
                kept.says_scarce = False
                log.warning("replica %s waits for room in the cluster: it needs %s", name, kept.group.wants)
            if state != kept.state:
                kept.state = state
                told = Changed(name, state, kept.group.host, kept.group.reason, kept.group.lost_host, kept.since)
                self._tell(told)
                if state == "ended":
                    self._ended(name, kept, kept.group, now)

    def _begin(self, name: str, kept: _Kept, now: float) -> None:
        try:
            kept.group, kept.since = self._start(name)
        except ValueError as error:
            if not self._have_been_ready:
                if now - self._began > _COMING:
                    raise GiveUp(str(error)) from error
                if kept.says_scarce:
                    kept.says_scarce = False
                    log.warning("replica %s waits for hosts to join the cluster: %s", name, error)
                kept.next_start = now + _SOON
                self._tell(Changed(name, "placing", reason=str(error)))
                return
            kept.next_start = now + _LONGEST  # hosts may come back
            self._tell(Changed(name, "ended", reason=str(error), lost_host=True))
            return
        kept.state, kept.began, kept.says_scarce = "placing", now, True
        self._tell(Changed(name, "placing", since=kept.since))

    def _ended(self, name: str, kept: _Kept, group: RankGroup, now: float) -> None:
        were_ready = name in self._ready
        if group.lost_host:
            pause: float | None = 0.0
        else:
            pause = kept.backoff.pause(were_ready, now - kept.began)
            if not were_ready and not self._have_been_ready:
                raise GiveUp(group.reason)
        if pause is None and not self._ready:
            raise GiveUp(group.reason)
        kept.group, kept.next_start, kept.says_scarce = None, now + (_LONGEST if pause is None else pause), True
        log.warning("the ranks of replica %s ended (%s), and are restarted", name, group.reason)

    def end(self) -> None:
        """End all replicas."""
        for kept in self._kept.values():
            if kept.group is not None and kept.state != "ended":
                kept.group.end("the server ends")


def serve_as_replica(settings: RankSettings, model: str, revision: str | None, link: RemoteLink) -> None:
    """Work on the front's attempts as one rank of a replica, until the process is ended.

    Args:
        settings: as of `serve_as_rank`, with paths of the front's host.
        model: the pipeline, for this host.
        revision: of a hub id.
        link: to the front.
    """
    os.umask(0o077)
    if os.environ.get("RANK", "0") == "0":
        link = replace(link, folder=str(ray_cluster.process_folder()))
    serve_as_rank(replace(settings, model=find_pipeline(model, revision)), link=link)


def watch_over_replicas(
    settings: ReplicaSettings, ranks: RankSettings, front: Connection, have_been_ready: bool
) -> None:
    """Keep the replicas running that the front wants. Exit with `GAVE_UP` or `NO_CLUSTER` if that is in vain.

    Args:
        settings: of the replicas.
        ranks: of their ranks.
        front: gets `Joined`, `Changed`, and, as text, the last reason. It sends a `Door`, and then `Wish` and `End`.
        have_been_ready: whether ranks of an earlier agent were ready.
    """
    forget_secrets(os.environ)
    os.setsid()  # Ctrl-C reaches every process of the terminal, and the front lets running jobs end
    threading.Thread(target=end_with_parent, daemon=True).start()
    logs.configure(ranks.log_format, ranks.log_level)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Ray prints the logs of nodes that are lost
    try:
        ray_cluster.connect(settings.address)
        interface = settings.interface
        address = ray_cluster.own_address() if interface is None else ray_cluster.address_of(interface)
        device = settings.device or ray_cluster.device_of(ray_cluster.resources())
        front.send(Joined(address, device))
        door: Door = front.recv()
    except Exception as error:
        where = "--replicas" if settings.address is None else f"--ray-address {settings.address}"
        front.send(f"{where}: Ray cannot be used: {ray_cluster.said(str(error))}")
        sys.exit(NO_CLUSTER)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray's own handler came with it
    starts = door.since

    def start(name: str) -> tuple[RankGroup, float]:
        nonlocal starts
        starts = max(time.time(), starts + 1e-3)  # also if the clock is set back
        link = RemoteLink(door.endpoint, door.token, door.key, name, starts)
        group = RankGroup(
            settings.ranks, device, settings.interface, variables(os.environ), serve_as_replica, ranks,
            settings.model, settings.revision, link,
        )  # fmt: skip
        return group, starts

    keeper = Keeper(start, front.send, have_been_ready)
    try:
        while True:
            keeper.advance()
            if front.poll(_CHECK):
                keeper.take(front.recv())
    except GiveUp as error:
        front.send(str(error))
        sys.exit(GAVE_UP)
    finally:
        keeper.end()


def forget_secrets(environment: MutableMapping[str, str]) -> None:
    """Remove the front's secrets: processes of a Ray that is started here inherit the environment."""
    for name in _SECRETS:
        environment.pop(name, None)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the front's environment, what ranks get."""
    return {name: environment[name] for name in _PASSED if name in environment}
