"""The ranks of this host: a process in which torch's elastic agent starts and watches them, begun anew if need be."""

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

from halovae.launch import end_with_parent, launch
from halovae.serving.engine import serve_as_rank
from halovae.serving.settings import RankSettings

_PAUSE = 0.2  # seconds between two looks, and before ranks are begun anew


class GroupLost(RuntimeError):
    """The ranks ended before they were ready: they would do so again."""


class Group:
    """Several ranks, as long as the server lives."""

    def __init__(self, ranks: int, settings: RankSettings) -> None:
        self._ranks, self._settings = ranks, settings
        self._context = multiprocessing.get_context("spawn")
        self._ready = self._context.Event()
        self._process: BaseProcess | None = None

    async def run(self) -> None:
        """Start the ranks, and start them again whenever they end.

        Raises:
            GroupLost: they ended before they were ready.
        """
        while True:
            self._ready.clear()
            self._process = self._context.Process(
                target=_watch_over, args=(self._ranks, self._settings, self._ready), name="agent"
            )
            self._process.start()
            while self._process.is_alive():
                await asyncio.sleep(_PAUSE)
            if not self._ready.is_set():
                raise GroupLost
            logging.getLogger(__name__).warning("the ranks' agent ended, and is begun anew")

    def stop(self) -> None:
        """End the ranks."""
        if self._process is not None:
            self._process.terminate()  # the agent ends its ranks
            self._process.join(10)
            self._process.kill()


def _watch_over(ranks: int, settings: RankSettings, ready: Event) -> None:
    """Keep ranks running. Ends with an error where they end before they are ready."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        ready.clear()
        try:
            launch(ranks, serve_as_rank, settings, ready)
        except KeyboardInterrupt:
            return
        except Exception:
            traceback.print_exc(limit=0)
            if not ready.is_set():
                sys.exit(1)
        time.sleep(_PAUSE)
