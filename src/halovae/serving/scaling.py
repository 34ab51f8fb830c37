"""How many replicas there are: their number follows the queue."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from halovae.serving.replicas import AHEAD

PATIENCE = 5.0  # seconds for which jobs wait before replicas are added


@dataclass
class Scaling:
    """The rule by which replicas are added and ended.

    Once jobs have been waiting for `PATIENCE` seconds, there is one replica for each `AHEAD` of them besides those
    that are ready, but at most `most`. While no job waits, a replica that has had none for `idle` seconds is ended,
    one at a time, but `least` stay: first those that are not ready, and of these the highest number.

    Args:
        least, most: how many replicas there are.
        idle: seconds without a job after which a replica is ended.
    """

    least: int
    most: int
    idle: float
    _waiting_since: float | None = field(default=None, init=False)

    def count(self, now: float, present: int, ready: int, waiting: int) -> int:
        """How many replicas there should be.

        Args:
            now: the time, in seconds.
            present: replicas there are, also those that are starting.
            ready: of these, those that are ready.
            waiting: jobs that no replica has.
        """
        if not waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        wanted = max(self.least, present)
        if self._waiting_since is not None and now - self._waiting_since >= PATIENCE:
            wanted = max(wanted, ready - (-waiting // AHEAD))
        return min(self.most, wanted)

    def idle_one(self, now: float, waiting: int, used: Mapping[str, float], ready: Collection[str]) -> str | None:
        """The replica to end; None for none.

        Args:
            now: the time, in seconds.
            waiting: jobs that no replica has.
            used: when each replica last had a job or began to start, by its number.
            ready: the numbers of those that are ready.
        """
        if waiting or len(used) <= self.least:
            return None
        in_order = sorted(used, key=lambda name: (name in ready, -int(name)))
        return next((name for name in in_order if now - used[name] >= self.idle), None)
