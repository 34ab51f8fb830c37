"""Rank processes that are started once and then run one function after the other.

They serve measurements and tests, which call many functions on the same ranks. `launch` starts ranks for one call.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from halovae.device.kinds import RANK_ENVIRONMENT
from halovae.distributed.launch import end_with_parent, environment
from halovae.distributed.transport import meet_in_file
from halovae.errors import RankError

Result = TypeVar("Result")
_PATIENCE = 10  # seconds that a process has to end before it is killed


class Ranks:
    """A group of processes on this host, which meet at the first collective call.

    Args:
        size: how many ranks.
        threads: CPU threads of each.
        variables: of their environment, besides this process's.
    """

    def __init__(self, size: int, threads: int = 1, variables: Mapping[str, str] = RANK_ENVIRONMENT) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="halovae-ranks-", ignore_cleanup_errors=True)
        store = Path(self._folder.name, "store")
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        with environment(variables):
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, size, store, threads, theirs), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def run(self, function: Callable[..., Result], *args: Any) -> list[Result]:
        """Call `function(*args)` on all ranks at once; both must be picklable.

        Returns:
            What it returned, by rank.

        Raises:
            RankError: it failed on a rank, whose traceback is the message; the group has been ended.
        """
        try:
            return self._run(function, args)
        except BaseException:  # answers that nobody takes would be taken for those of the next call
            self.close()
            raise

    def _run(self, function: Callable[..., Result], args: Sequence[Any]) -> list[Result]:
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Result] = {}
        while len(results) < len(self._connections):
            waiting = [one for rank, one in enumerate(self._connections) if rank not in results]
            ready = wait(waiting)
            for rank in [rank for rank, one in enumerate(self._connections) if one in ready]:
                try:
                    failed, answer, cause = self._connections[rank].recv()
                except EOFError:
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    failed, answer, cause = True, f"the process ended with exit code {code}", None
                if failed:
                    killed = self._was_killed()
                    message = f"rank {rank} failed, and all ranks were ended:\n{answer}"
                    raise RankError(message, cause, killed)
                results[rank] = answer
        return [results[rank] for rank in range(len(self._connections))]

    @property
    def alive(self) -> bool:
        """Whether none of its processes has ended."""
        return all(process.is_alive() for process in self._processes)

    def _was_killed(self) -> bool:
        """Whether the system killed a rank. What another one says of its lost connection can arrive first."""
        ended = wait([process.sentinel for process in self._processes], timeout=1)
        for process in self._processes:
            if process.sentinel in ended:
                process.join(1)  # its files are closed before it can be waited for
        return any(process.exitcode == -signal.SIGKILL for process in self._processes)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_PATIENCE)
            process.kill()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, size: int, store: Path, threads: int, connection: Connection) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    meet_in_file(store)
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, args=(store.parent,), daemon=True).start()
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            break
        try:
            connection.send((False, function(*args), None))
        except Exception as error:
            try:
                connection.send((True, traceback.format_exc(), error))
            except (TypeError, AttributeError, pickle.PicklingError):
                connection.send((True, traceback.format_exc(), None))
    if dist.is_initialized():
        dist.destroy_process_group()
