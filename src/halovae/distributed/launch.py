"""Start ranks on this host with torch's elastic launcher, or join those that torchrun has started."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from halovae.device.kinds import INTERFACES, RANK_ENVIRONMENT, threads_per_rank
from halovae.distributed.mesh import leave_world
from halovae.distributed.transport import meet_in_file, world_size
from halovae.errors import RankError


def launch(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on `ranks` ranks.

    One rank runs in this process. Several are new processes; `function` and `args` must be picklable. Under torchrun
    this process is a rank already: the function runs here, and `ranks` must be the world's size.

    New processes meet in a file that only this user can open, and listen on the loopback interface only. They join
    their process group by `halovae.distributed.transport.join_world`: there is no `MASTER_ADDR`.

    Returns:
        What the function returned, by rank; under torchrun, on this rank only.

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
    ours = {"OMP_NUM_THREADS": str(threads_per_rank(ranks)), **RANK_ENVIRONMENT}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are shown once, by us
    try:
        with (
            tempfile.TemporaryDirectory(prefix="halovae-ranks-", ignore_cleanup_errors=True) as folder,
            environment({name: value for name, value in ours.items() if name not in os.environ}),
        ):
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend=_OneAgent.NAME,
                local_addr="127.0.0.1",
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            results = elastic_launch(config, _rank_main)(Path(folder, "store"), function, *args)
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped
    except ChildFailedError as failed:
        rank, failure = _cause(failed.failures)
        if failure.exitcode == -signal.SIGINT:
            raise KeyboardInterrupt from failed
        reason = failure.message
        if isinstance(reason, dict):
            reason = reason.get("extraInfo", {}).get("py_callstack") or reason.get("message", str(reason))
        raise RankError(f"rank {rank} failed, and all ranks were ended:\n{str(reason).rstrip()}") from failed
    return [results[rank] for rank in range(ranks)]


# How torch and gloo report that another rank ended.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the first rank that failed, and how. Ranks that only lost their connection to it come after it.

    Recorded times are whole seconds: they do not tell ranks apart that fail within the same one.
    """
    rank = min(
        failures, key=lambda one: (any(text in str(failures[one].message) for text in _LOST), failures[one].timestamp)
    )
    return rank, failures[rank]


@contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Let processes that are started meanwhile have these variables besides; this one's environment comes back."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _OneAgent(RendezvousHandler):
    """Rendezvous of the only agent. Its store is its own memory.

    torch's handlers open a TCP store on all interfaces, and unpickle what anybody writes there.
    """

    NAME = "halovae"

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id

    def get_backend(self) -> str:
        return self.NAME

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        # torch takes an empty MASTER_ADDR for a missing one, so no rank can open a TCP store by accident.
        store = dist.HashStore()  # type: ignore[attr-defined]
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo("", 0))

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(_OneAgent.NAME, _OneAgent)


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets its environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def use_interface(name: str) -> None:
    """Let the ranks of this host listen on a network interface, for backends whose variable names none.

    Call it before the process group is created.

    Raises:
        ValueError: this host has no such interface, or torchrun has not started this process.
    """
    if not under_torchrun():
        raise ValueError("ranks that torchrun has not started are on one host, and use loopback: omit it")
    present = psutil.net_if_addrs()
    if name not in present:
        raise ValueError(f"this host has no such network interface; here: {', '.join(sorted(present))}")
    for variable in INTERFACES.values():
        if not os.environ.get(variable, "").strip():
            os.environ[variable] = name


def end_with_parent(folder: Path | None = None) -> None:
    """Wait for the end of the process that started this one, and end it too; for a thread.

    A parent that is killed cannot end its ranks, and a rank that computes does not read its connection.

    Args:
        folder: a temporary one that the parent made, and cannot remove once it is killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


@record
def _rank_main(store: Path, function: Callable[..., Any], *args: Any) -> Any:
    meet_in_file(store)
    threading.Thread(target=end_with_parent, args=(store.parent,), daemon=True).start()
    # torch has the system interrupt a rank whose launcher ended, which would leave no time to remove the folder.
    torch.multiprocessing._prctl_pr_set_pdeathsig(0)  # type: ignore[attr-defined]
    # Ctrl-C reaches every process of the terminal; the launcher is the one to report it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    result = function(*args)
    leave_world()  # not after an error: other ranks would fail, too, before this one's error is recorded
    return result


def _in_world(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    finally:
        leave_world()
