"""`halovae serve`: a server for videos and pictures."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import psutil
import typer

from halovae.cli.common import (
    Dtype,
    check_installed,
    console,
    degrees,
    errors_shown,
    fail,
    parse_bytes,
    parse_size,
    parsed,
)  # fmt: skip
from halovae.distributed.launch import under_torchrun
from halovae.distributed.transport import world_size
from halovae.grid import Grid
from halovae.pipelines.specs import Pipeline, find_pipeline
from halovae.runtime.options import Mode

if TYPE_CHECKING:
    from halovae.serving.settings import FrontSettings, RankSettings

# Set in a front that rank 0 has started: the process id of torchrun's agent. The front ends when the agent ends.
_AGENT = "HALOVAE_AGENT"
_KEY = "HALOVAE_API_KEY"
_VAE_MODES: dict[str, Mode] = {"auto": "auto", "on": "parallel", "off": "single"}
_CHECK = 2.0  # seconds between two checks that the front, or the agent, is still running


def serve(
    model_path: Annotated[str, typer.Option(help="Folder of a pipeline in diffusers layout, or a hub id.")],
    num_gpus: Annotated[int | None, typer.Option(min=1, help="How many ranks to start here.", show_default="1")] = None,
    sp_degree: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that share the transformer's sequence: all, or 1.", show_default="all"),
    ] = None,
    ulysses_degree: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of these, ranks that share attention by heads.", show_default="what --ring-degree leaves"
        ),
    ] = None,
    ring_degree: Annotated[int, typer.Option(min=1, help="Ranks that share attention as a ring.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the transformer and the text encoder.")] = Dtype.bf16,
    vae_precision: Annotated[Dtype, typer.Option(help="Dtype of the VAE.")] = Dtype.fp32,
    vae_parallel: Annotated[
        str, typer.Option(help="Whether ranks share decodes and encodes: auto (where that is faster), on, or off.")
    ] = "auto",
    vae_grid: Annotated[
        str | None,
        typer.Option(help="Grid of a decode, as ROWSxCOLS. Takes the place of --vae-parallel."),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory that a rank may take for a decode, such as 8GiB.", show_default="what is free"),
    ] = None,
    cpu_offload: Annotated[
        bool,
        typer.Option("--cpu-offload", help="Keep unused models other than the VAE in the host's memory."),
    ] = False,
    decode_batch: Annotated[int, typer.Option(min=1, help="How many results of one size to decode together.")] = 4,
    warmup: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES to generate before the first request."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=_KEY, help="Key that clients must send.", show_default="none, on a loopback address only"),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everyone who can reach --host use the server without a key.")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="Folder for jobs; finished files go to results/.")] = Path("outputs"),
    max_queue: Annotated[int, typer.Option(min=1, help="How many jobs may wait; further ones get 429.")] = 100,
    max_body: Annotated[str, typer.Option(help="Size limit of a request.")] = "64MiB",
    expire_after: Annotated[float, typer.Option(min=0.001, help="How long finished files are kept, in hours.")] = 24.0,
    max_output: Annotated[
        str | None,
        typer.Option(help="Size limit of all finished files; the oldest go first.", show_default="no limit"),
    ] = None,
    allow_url_inputs: Annotated[
        bool, typer.Option("--allow-url-inputs", help="Fetch pictures from URLs on the public internet.")
    ] = False,
) -> None:
    """Serve videos and pictures over an HTTP API like OpenAI's, and on a page at /.

    On several hosts, run it under torchrun on each, with the same options and without --num-gpus.
    """
    with errors_shown():
        check_installed("serve", "diffusers", "transformers", "fastapi", "uvicorn", "zmq", extra="diffusers,serve")
        from halovae.serving.limits import Limits
        from halovae.serving.settings import FrontSettings, RankSettings

        key = _key(api_key, host, no_auth)
        under = under_torchrun()
        ranks = num_gpus or (world_size() if under else 1)
        if under and ranks != world_size():
            raise ValueError(f"--num-gpus {ranks}, but torchrun has started {world_size()} ranks: omit it")
        ulysses, ring = degrees(ranks, sp_degree, ulysses_degree, ring_degree)
        if vae_parallel not in _VAE_MODES:
            raise ValueError(f"--vae-parallel {vae_parallel}: expected {', '.join(_VAE_MODES)}")
        grid = parsed("--vae-grid", vae_grid, _parse_grid) if vae_grid else None
        if grid is not None and grid.size not in (1, ranks):
            raise ValueError(f"--vae-grid {vae_grid}: expected a grid of all {ranks} ranks, or 1x1")
        folder = find_pipeline(model_path)
        pipeline = Pipeline.read(folder)
        output_dir = output_dir.absolute()
        output_dir.mkdir(parents=True, exist_ok=True)
        rank_settings = RankSettings(
            model=folder,
            output=output_dir,
            dtype=dtype.torch,
            vae_dtype=vae_precision.torch,
            ulysses=ulysses,
            ring=ring,
            vae_mode=_VAE_MODES[vae_parallel],
            vae_grid=grid,
            memory_budget=parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None,
            offload=cpu_offload,
            decode_batch=decode_batch,
            warmup=parsed("--warmup", warmup, _parse_warmup) if warmup else None,
        )
        front_settings = FrontSettings(
            name=Path(model_path).name if Path(model_path).is_dir() else model_path,
            pipeline=pipeline,
            host=host,
            port=port,
            api_key=key,
            limits=Limits(queue=max_queue, body=parsed("--max-body", max_body, parse_bytes)),
            expire_after=expire_after * 3600,
            max_output=parsed("--max-output", max_output, parse_bytes) if max_output else None,
            allow_url_inputs=allow_url_inputs,
        )
        if under:
            _run_rank(rank_settings)
        else:
            _run_front(rank_settings, front_settings, None if _AGENT in os.environ else ranks)


def _run_front(ranks: RankSettings, front: FrontSettings, start: int | None) -> None:
    """Run the front. With `start`, also start this many ranks; otherwise end when the agent of the ranks ends."""
    from halovae.serving.app import make_app
    from halovae.serving.http_server import HttpServer
    from halovae.serving.supervisor import RanksLost, Supervisor
    from halovae.serving.table import opened

    lock = _locked(ranks.output)
    if lock is None:
        raise ValueError(f"--output-dir {ranks.output}: another server is using it")
    try:
        listening = socket.create_server((front.host, front.port), family=_family(front.host), backlog=2048)
    except OSError as error:
        raise OSError(f"--host {front.host} --port {front.port}: cannot listen ({error.strerror})") from error
    opened(ranks.output / "jobs.sqlite").close()  # an error is shown before anything starts
    failures: list[str] = []

    def give_up(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    supervisor = Supervisor(start, ranks) if start is not None else None
    watch = supervisor.run if supervisor is not None else _agent_gone
    app = make_app(ranks, front, give_up, _kill_ranks if supervisor is None else supervisor.restart)
    server = HttpServer(app, front.drain_timeout, partial(console.print, highlight=False, soft_wrap=True))

    async def run() -> None:
        serving, watching = asyncio.create_task(server.serve([listening])), asyncio.create_task(watch())
        address = "localhost" if front.host in ("0.0.0.0", "::") else front.host
        console.print(f"serving {front.name} on http://{address}:{front.port} (page: /, API: /docs)", highlight=False)
        await asyncio.wait([serving, watching], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        error = watching.exception() if watching.done() else None
        watching.cancel()
        if isinstance(error, RanksLost):
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
    console.print(f"ended; jobs are kept in {ranks.output}", soft_wrap=True)


async def _agent_gone() -> None:
    agent = psutil.Process(int(os.environ[_AGENT]))
    while agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(_CHECK)


def _kill_ranks(reason: str) -> None:
    """Kill the ranks of this host. The agents of all hosts start others."""
    console.print(f"the ranks are ended: {reason}", highlight=False)
    for rank in psutil.Process(int(os.environ[_AGENT])).children():
        rank.kill()


def _run_rank(settings: RankSettings) -> None:
    """Run a rank that torchrun has started. Rank 0 also keeps a front running; the front outlives rank 0."""
    from halovae.serving.engine import serve_as_rank

    if os.environ["RANK"] == "0":
        threading.Thread(target=_keep_front, args=(settings.output,), daemon=True).start()
    serve_as_rank(settings)


def _keep_front(output: Path) -> None:
    """Run a front, unless an earlier rank 0 started one that is still running. A front that fails ends this rank."""
    ours = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_")
    environment = {name: value for name, value in os.environ.items() if not ours.search(name)}
    environment[_AGENT] = str(os.getppid())
    command = [sys.executable, "-m", "halovae.cli.main", *sys.argv[1:], "--num-gpus", str(world_size())]
    while True:
        lock = _locked(output)
        if lock is not None:
            lock.close()
            if subprocess.run(command, env=environment, start_new_session=True).returncode > 0:
                os._exit(1)
        time.sleep(_CHECK)


def _locked(output: Path) -> IO[str] | None:
    """Take the lock of the output folder and return it; None if another front holds it."""
    lock = (output / ".lock").open("a")  # keeps the content of an existing file
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _key(option: str | None, host: str, no_auth: bool) -> str | None:
    """Return the key that clients must send; None for no key.

    Raises:
        ValueError: the key is blank or cannot be sent, or is missing where others could reach the server, or is given
            with `no_auth`.
    """
    value = os.environ.get(_KEY) if option is None else option  # typer takes a blank variable for none
    if value is None:
        if not (no_auth or _is_loopback(host)):
            raise ValueError(f"--host {host}: others could reach the server; give --api-key or {_KEY}, or --no-auth")
        return None
    key = value.strip()
    if not (key and key.isprintable()):
        raise ValueError(f"--api-key (or {_KEY}) is blank, or has characters that cannot be sent")
    if no_auth:
        raise ValueError(f"--no-auth, but also a key (--api-key or {_KEY}): omit one")
    return key


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse_grid(text: str) -> Grid:
    rows, cols = parse_size(text)
    return Grid(rows=rows, cols=cols)


def _parse_warmup(text: str) -> tuple[int, int, int]:
    size, frames = text.rsplit("x", 1) if text.count("x") == 2 else (text, "1")
    if not frames.isdigit() or int(frames) < 1:
        raise ValueError("expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES")
    return *parse_size(size), int(frames)
