"""`halovae serve`: a server for videos and pictures."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from halovae.cli.common import check_installed, console, errors_shown, fail, parsed
from halovae.cli.serve_checks import KEY
from halovae.cli.serve_options import ServeOptions, takes_options
from halovae.distributed.launch import under_torchrun, use_interface
from halovae.distributed.transport import world_size

if TYPE_CHECKING:
    from halovae.serving.settings import FrontSettings, RankSettings

log = logging.getLogger(__name__)
# Set in a front that rank 0 has started: the process id of torchrun's agent. The front ends when the agent ends.
_AGENT = "HALOVAE_AGENT"
_CHECK = 2.0  # seconds between two checks that the front, or the agent, is still running


@takes_options
def serve(options: ServeOptions) -> None:
    """Serve videos and pictures over an HTTP API like OpenAI's, and on a page at /.

    On several hosts, run it under torchrun on each, with the same options and without --num-gpus; or give --replicas,
    and Ray starts groups of ranks on the hosts of its cluster.
    """
    with errors_shown():
        needed = (
            "diffusers", "transformers", "fastapi", "fastapi_offline", "uvicorn", "zmq", "httpx", "structlog", "limits",
        )  # fmt: skip
        check_installed("serve", *needed, extra="diffusers,serve")
        if options.replicas is not None:
            check_installed(f"--replicas {options.replicas}", "ray", extra="ray")
        from halovae.serving import logs

        os.umask(0o077)  # jobs, results, and secrets are for this user only
        if options.interface is not None and _AGENT not in os.environ and options.replicas is None:
            parsed("--interface", options.interface, use_interface)
        ranks, front = options.settings()
        logs.configure(ranks.log_format, ranks.log_level)
        if under_torchrun():
            _run_rank(ranks, front.api_key)
        else:
            _run_front(ranks, front, None if _AGENT in os.environ else options.ranks)


def _run_front(ranks: RankSettings, front: FrontSettings, start: int | None) -> None:
    """Run the front. With `start`, also start this many ranks; otherwise end when the agent of the ranks ends."""
    from halovae.serving.app import make_app
    from halovae.serving.http_server import HttpServer, listening
    from halovae.serving.replica_supervisor import ReplicaSupervisor
    from halovae.serving.supervisor import RanksLost, Supervisor
    from halovae.serving.table import opened

    lock = _locked(ranks.output)
    if lock is None:
        raise ValueError(f"--output-dir {ranks.output}: another server is using it")
    main_socket = listening(front.host, front.port)
    opened(ranks.output / "jobs.sqlite").close()  # an error is shown before anything starts
    failures: list[str] = []

    def give_up(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    supervisor: Supervisor | ReplicaSupervisor | None = None
    if front.replicas is not None:
        supervisor = ReplicaSupervisor(front.replicas, ranks)
        app = make_app(ranks, front, give_up, fleet=supervisor)
    elif start is not None:
        supervisor = Supervisor(start, ranks)
        app = make_app(ranks, front, give_up, supervisor.restart)
    else:
        app = make_app(ranks, front, give_up, _kill_ranks)
    watch = supervisor.run if supervisor is not None else _agent_gone
    in_json = ranks.log_format == "json"

    def tell(text: str) -> None:
        if in_json:
            log.info(text)
        else:
            console.print(text, highlight=False, soft_wrap=True)

    server = HttpServer(app, front.drain_timeout, tell)

    async def run() -> None:
        serving, watching = asyncio.create_task(server.serve([main_socket])), asyncio.create_task(watch())
        if front.api_key_file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, app.state.keys.reload)
        docs = "/docs" if front.admin_port is None else f"http://{front.admin_host}:{front.admin_port}/docs"
        tell(f"serving {front.name} on {front.url()} (page: /, API: {docs})")
        await asyncio.wait([serving, watching], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        error = watching.exception() if watching.done() else None
        watching.cancel()
        if isinstance(error, RanksLost):
            if str(error).startswith("--"):  # of another option
                raise ValueError(str(error))
            raise ValueError(f"--model-path {ranks.model}: the ranks ended before they were ready: {error}")
        if error is not None:
            failures.append(f"the supervision of the ranks ended ({error!r})")

    try:
        asyncio.run(run())
    finally:
        if supervisor is not None:
            supervisor.stop()
        lock.close()
    if failures:
        fail(f"the server gave up: {'; '.join(failures)}; jobs are kept in {ranks.output}", 1)
    tell(f"ended; jobs are kept in {ranks.output}")


async def _agent_gone() -> None:
    agent = psutil.Process(int(os.environ[_AGENT]))
    while agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(_CHECK)


def _kill_ranks(reason: str, seconds: float) -> bool:
    """Kill the ranks of this host, if all are older than `seconds`. The agents of all hosts start others."""
    from halovae.serving.supervisor import older

    agent = psutil.Process(int(os.environ[_AGENT]))
    if not older(agent, seconds):
        return False
    log.warning("the ranks are killed: %s", reason)
    for rank in agent.children():
        rank.kill()
    return True


def _run_rank(settings: RankSettings, key: str | None) -> None:
    """Run a rank that torchrun has started. Rank 0 also keeps a front running; the front outlives rank 0."""
    from halovae.serving.engine import serve_as_rank

    if os.environ["RANK"] == "0":
        threading.Thread(target=_keep_front, args=(settings.output, key), daemon=True).start()
    serve_as_rank(settings)


def _keep_front(output: Path, key: str | None) -> None:
    """Run a front, unless an earlier rank 0 started one that is still running. A front that fails ends this rank."""
    ours = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_")
    environment = {name: value for name, value in os.environ.items() if not ours.search(name)}
    environment[_AGENT] = str(os.getppid())
    if key is not None:
        environment[KEY] = key
    command = [sys.executable, "-m", "halovae.cli.main", *_without_key(sys.argv[1:]), "--num-gpus", str(world_size())]
    while True:
        lock = _locked(output)
        if lock is not None:
            lock.close()
            if subprocess.run(command, env=environment, start_new_session=True).returncode > 0:
                os._exit(1)
        time.sleep(_CHECK)


def _without_key(words: Sequence[str]) -> list[str]:
    """Return the words of a command without --api-key, which `ps` would show."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--api-key":
            next(rest, None)
        elif not word.startswith("--api-key="):
            kept.append(word)
    return kept


def _locked(output: Path) -> IO[str] | None:
    """Take the lock of the output folder and return it; None if another front holds it."""
    lock = (output / ".lock").open("a")  # keeps the content of an existing file
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock
