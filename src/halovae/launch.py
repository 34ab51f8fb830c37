"""Start ranks on this host with torch's elastic launcher, or join those that torchrun has started."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from halovae.lines import world_size
from halovae.mesh import leave_world
from halovae.platform import RANK_ENVIRONMENT, threads_per_rank


class RankError(RuntimeError):
    """A rank failed, and the others were ended. The message holds the failing rank's traceback or signal.

    Attributes:
        cause: the exception that ended the rank, where it is known.
        killed: whether the system ended it (SIGKILL), as it does when the host's memory runs out.
    """

    def __init__(self, message: str, cause: Exception | None = None, killed: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.killed = killed


def launch(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on `ranks` ranks.

    One rank runs in this process. Several are new processes; `function` and `args` must be picklable. Under torchrun
    this process is a rank already: the function runs here, and `ranks` must be the world's size.

    Returns:
        What the function returned, by rank; under torchrun, for this rank alone.

    Raises:
        ValueError: `ranks` is not the size of the world that torchrun started.
        RankError: a rank failed; the others have been ended.
        KeyboardInterrupt: the user interrupted; all ranks have been ended.
    """
    if under_torchrun():
        if ranks != world_size():
            raise ValueError(f"{ranks} ranks asked for, but torchrun has started {world_size()}: leave the number out")
        return [_in_world(function, *args)]
    if ranks == 1:
        return [function(*args)]
    for name, value in {"OMP_NUM_THREADS": str(threads_per_rank(ranks)), **RANK_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are shown once, by us
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        results = elastic_launch(config, _rank_main)(function, *args)
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == -signal.SIGINT:
            raise KeyboardInterrupt from failed
        reason = failure.message
        if isinstance(reason, dict):
            reason = reason.get("extraInfo", {}).get("py_callstack") or reason.get("message", str(reason))
        raise RankError(f"rank {rank} failed, and all ranks were ended:\n{str(reason).rstrip()}") from failed
    return [results[rank] for rank in range(ranks)]


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets its environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end it too; for a thread.

    A parent that is killed cannot end its ranks, and one that computes does not look at its lines.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@record
def _rank_main(function: Callable[..., Any], *args: Any) -> Any:
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the launcher is the one to report it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _in_world(function, *args)


def _in_world(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    finally:
        leave_world()
