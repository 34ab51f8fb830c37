"""Runs the ranks of this host. An agent process starts and watches them with torch's elastic agent."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import psutil

from halovae.distributed.launch import end_with_parent, launch
from halovae.serving.engine import serve_as_rank
from halovae.serving.settings import RankSettings

log = logging.getLogger(__name__)
_PAUSES = 0.2, 30.0  # seconds before ranks are restarted: the first time, and at most
_SOON = 5.0  # the same, at most, for ranks that were ready
_STEADY = 60.0  # seconds after which ranks that were ready count as sound
_CHECK = 0.2  # seconds between two checks
# Starts in a row that may end before the ranks are ready, once they have been ready: something may kill them as they
# load.
_TRIES = 5
GAVE_UP = 3  # the agent's exit code
_LEAVE = 2.0  # seconds for ranks to end by themselves when their agent is killed


class RanksLost(RuntimeError):
    """The ranks ended before they were ready. Another start would fail too. The message is the last reason."""


class Backoff:
    """When to restart ranks that ended: later each time, and, if they were not even ready, in the end not at all.

    Args:
        have_been_ready: whether earlier ranks were ready. The first ones must be: the next start would fail too.
    """

    def __init__(self, have_been_ready: bool = False) -> None:
        self._left, self._pause = _TRIES if have_been_ready else 1, _PAUSES[0]

    def pause(self, were_ready: bool, seconds: float) -> float | None:
        """Return the seconds to wait before the next start; None to give up. `seconds`: how long the ranks lived."""
        if were_ready:
            self._left = _TRIES
            self._pause = _PAUSES[0] if seconds > _STEADY else min(2 * self._pause, _SOON)
            return self._pause
        self._left -= 1
        self._pause = min(2 * self._pause, _PAUSES[1])
        return self._pause if self._left > 0 else None


class Supervisor:
    """Keeps several ranks running for as long as the server lives."""

    def __init__(self, ranks: int, settings: RankSettings) -> None:
        self._ranks, self._settings = ranks, settings
        self._context = multiprocessing.get_context("spawn")
        self._ready = self._context.Event()
        self._process: BaseProcess | None = None
        self._agent: psutil.Process | None = None

    async def run(self) -> None:
        """Start the ranks, and restart them whenever they end.

        Raises:
            RanksLost: the ranks ended before they were ready, at the first start or several times in a row.
        """
        backoff, has_been_ready = Backoff(), False
        while True:
            reasons, sender = self._context.Pipe(duplex=False)
            self._process = self._context.Process(
                target=_watch_over,
                args=(self._ranks, self._settings, self._ready, has_been_ready, sender),
                name="agent",
            )
            begin = time.monotonic()
            self._process.start()
            self._agent = psutil.Process(self._process.pid)
            sender.close()
            while self._process.is_alive():
                await asyncio.sleep(_CHECK)
            code = self._process.exitcode or 0
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            while reasons.poll():
                try:
                    reason = reasons.recv()
                except EOFError:
                    break
            pause = None if code == GAVE_UP else backoff.pause(self._ready.is_set(), time.monotonic() - begin)
            if pause is None:
                raise RanksLost(reason)
            has_been_ready = has_been_ready or self._ready.is_set()
            log.warning("the ranks' agent ended (%s), and is restarted in %.1f s", reason, pause)
            self._ready.clear()
            await asyncio.sleep(pause)

    def restart(self, reason: str, seconds: float) -> bool:
        """End all ranks at once, even stopped ones, so that `run` starts others. Returns before they have ended.

        Ranks of which some are younger than `seconds` are starting: they stay, and False is returned.
        """
        if self._agent is None or not older(self._agent, seconds):
            return False
        log.warning("the ranks are restarted: %s", reason)
        threading.Thread(target=_kill, args=(self._agent,), daemon=True).start()
        return True

    def stop(self) -> None:
        """End the ranks."""
        if self._process is not None:
            self._process.terminate()  # the agent ends its ranks
            self._process.join(10)
            if self._agent is not None:
                _kill(self._agent)


def older(agent: psutil.Process, seconds: float) -> bool:
    """Whether an agent's ranks have been running for so many seconds; a single rank is the agent itself."""
    try:
        ranks = agent.children(recursive=True) or [agent]
        return all(time.time() - rank.create_time() > seconds for rank in ranks)
    except psutil.NoSuchProcess:
        return False


def _kill(agent: psutil.Process) -> None:
    try:
        ranks = agent.children(recursive=True)
        agent.kill()
    except psutil.NoSuchProcess:
        return
    _, stuck = psutil.wait_procs(ranks, _LEAVE)
    for rank in stuck:
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            continue


def _watch_over(ranks: int, settings: RankSettings, ready: Event, have_been_ready: bool, reasons: Connection) -> None:
    """Keep ranks running. Exit with `GAVE_UP` if they end before they are ready, as `Backoff` says."""
    os.setsid()  # Ctrl-C reaches every process of the terminal, and the front lets running jobs end
    threading.Thread(target=end_with_parent, daemon=True).start()
    backoff = Backoff(have_been_ready)
    while True:
        begin = time.monotonic()
        try:
            launch(ranks, serve_as_rank, settings, ready)
        except KeyboardInterrupt:
            return
        except Exception as error:
            traceback.print_exc(limit=0)
            reasons.send((str(error).strip() or repr(error)).splitlines()[-1][:500])
        pause = backoff.pause(ready.is_set(), time.monotonic() - begin)
        if pause is None:
            sys.exit(GAVE_UP)
        ready.clear()
        time.sleep(pause)
