"""Jobs on disk, for an event loop: SQLite and file systems are slow at times, and no request may wait for that."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from halovae.serving.table import JobTable, opened

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
_PAUSE = 0.5  # seconds between two tries to write


class JobStore:
    """The jobs of an output folder. One thread writes, another one reads: a locked database can still be read.

    Args:
        path: of the database.
        keeps_events: whether an event is kept for each job that ends.
    """

    def __init__(self, path: Path, keeps_events: bool = False) -> None:
        self._writer, self._reader = (ThreadPoolExecutor(1, f"jobs {name}") for name in ("writer", "reader"))
        self._to_write = self._writer.submit(opened, path).result()
        if keeps_events:
            self._writer.submit(self._to_write.keep_events).result()
        self._to_read = self._reader.submit(JobTable, path).result()

    async def read(self, query: Callable[Concatenate[JobTable, P], T], *args: P.args, **options: P.kwargs) -> T:
        """Return what a method of `JobTable` returns that only reads."""
        call = self._reader.submit(query, self._to_read, *args, **options)
        return await asyncio.wrap_future(call)

    async def write(self, change: Callable[Concatenate[JobTable, P], T], *args: P.args, **options: P.kwargs) -> T:
        """Call a method of `JobTable` that writes. What it changed is on disk when this returns.

        Raises:
            sqlite3.OperationalError: the database is locked or the disk is full. Nothing was changed.
        """
        call = self._writer.submit(change, self._to_write, *args, **options)
        return await asyncio.wrap_future(call)

    async def write_patiently(
        self, seconds: float, change: Callable[Concatenate[JobTable, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        """Call `write`, and try again while the database is locked or the disk full, for at most `seconds`."""
        waiting, deadline = False, time.monotonic() + seconds
        while True:
            try:
                return await self.write(change, *args, **options)
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                if not waiting:
                    log.warning("the jobs cannot be written (%s): writing is tried again", error)
                waiting = True
                await asyncio.sleep(_PAUSE)

    def close(self) -> None:
        """Close the database. Changes that are under way are completed first."""
        for thread, table in ((self._reader, self._to_read), (self._writer, self._to_write)):
            with suppress(sqlite3.Error):
                thread.submit(table.close).result()
            thread.shutdown()
