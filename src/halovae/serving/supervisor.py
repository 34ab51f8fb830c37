"""Runs the ranks of this host. An agent process starts and watches them with torch's elastic agent."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sys
import threading
import time
import traceback
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

from halovae.distributed.launch import end_with_parent, launch
from halovae.serving.engine import serve_as_rank
from halovae.serving.settings import RankSettings

_PAUSE = 0.2  # seconds between two checks, and before ranks are restarted
# Starts in a row that may end before the ranks are ready, once they have been ready: something may kill them as they
# load.
_TRIES = 5
_GAVE_UP = 3  # the agent's exit code


class RanksLost(RuntimeError):
    """The ranks ended before they were ready. Another start would fail too."""


class Supervisor:
    """Keeps several ranks running for as long as the server lives."""

    def __init__(self, ranks: int, settings: RankSettings) -> None:
        self._ranks, self._settings = ranks, settings
        self._context = multiprocessing.get_context("spawn")
        self._ready = self._context.Event()
        self._process: BaseProcess | None = None

    async def run(self) -> None:
        """Start the ranks, and restart them whenever they end.

        Raises:
            RanksLost: the ranks ended before they were ready.
        """
        while True:
            self._process = self._context.Process(
                target=_watch_over, args=(self._ranks, self._settings, self._ready), name="agent"
            )
            self._process.start()
            while self._process.is_alive():
                await asyncio.sleep(_PAUSE)
            if self._process.exitcode == _GAVE_UP:
                raise RanksLost
            logging.getLogger(__name__).warning("the ranks' agent ended, and is restarted")

    def stop(self) -> None:
        """End the ranks."""
        if self._process is not None:
            self._process.terminate()  # the agent ends its ranks
            self._process.join(10)
            self._process.kill()


def _watch_over(ranks: int, settings: RankSettings, ready: Event) -> None:
    """Keep ranks running. Exit with `_GAVE_UP` if the first start, or `_TRIES` later ones in a row, end unready."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    left = 1
    while True:
        ready.clear()
        try:
            launch(ranks, serve_as_rank, settings, ready)
        except KeyboardInterrupt:
            return
        except Exception:
            traceback.print_exc(limit=0)
            left = _TRIES if ready.is_set() else left - 1
            if left == 0:
                sys.exit(_GAVE_UP)
        time.sleep(_PAUSE)
