"""A front over HTTP, and stub ranks that write frames without any model."""

import base64
import io
import json
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import zmq
from PIL import Image

from halovae.io import media
from halovae.pipelines.specs import Pipeline
from halovae.serving.app import make_app
from halovae.serving.channel import Link, RankChannel, SocketFolder
from halovae.serving.http_server import HttpServer
from halovae.serving.limits import Limits
from halovae.serving.replicas import Fleet
from halovae.serving.settings import FrontSettings, RankSettings

DECODE = {
    "seconds": 0.5, "plan": "2x1", "why": "the fastest", "batch": 1, "peak_memory_mb": 900.0,
    "peak_allocated_mb": 100.0, "pool_overhead_mb": 20.0, "remaining_mb": 4000.0,
    "predicted": {"seconds": 0.4, "peak_allocated_mb": 101.0},
    "one_device": {"seconds": 0.8, "peak_allocated_mb": 200.0}, "fell_back": "",
}  # fmt: skip
_FILE = io.BytesIO()
Image.new("RGB", (24, 16), "red").save(_FILE, "jpeg")
PREVIEW = _FILE.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class StubRanks(threading.Thread):
    """Serves attempts like rank 0. While `held` is set, it stays at the first step; if `fails`, attempts fail."""

    def __init__(self, link: Path | Link) -> None:
        super().__init__(daemon=True)
        self.channel = RankChannel(link)
        self.channel.ready = True
        self.held = threading.Event()
        self.fails = False
        self.end_server: Callable[[], object] = lambda: None
        self.seen: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        while True:
            attempt = self.channel.attempts.get()
            self.seen.append(attempt)
            self.channel.send("started", attempt["attempt"])
            self.channel.send("progress", attempt["attempt"], stage="denoising", done=1)
            if attempt["preview_every"] == 1:
                self.channel.send("preview", attempt["attempt"], step=1, picture=base64.b64encode(PREVIEW).decode())
            while self.held.is_set() and attempt["attempt"] not in self.channel.cancelled:
                time.sleep(0.01)
            if attempt["attempt"] in self.channel.cancelled:
                self.channel.send("cancelled", attempt["attempt"])
                continue
            if self.fails:
                self.channel.send("failed", attempt["attempt"], code="out_of_memory", message="no plan fits")
                continue
            self.channel.send("denoised", attempt["attempt"], seconds=0.1)
            width, height = (min(side, 64) for side in attempt["prompt"]["size"])  # however much a fuzzer asks for
            frames = torch.zeros(3, min(attempt["prompt"]["frames"], 5), height, width, dtype=torch.uint8)
            paths = [self.channel.place(path) for path in attempt["paths"]]
            for path in paths:
                sink = media.Sink(path, attempt["fps"])
                sink.write(frames)
                sink.close(whole=True)
            self.channel.deliver(attempt["attempt"], paths)
            self.channel.send("progress", attempt["attempt"], stage="decoding", done=frames.shape[1])
            self.channel.send("finished", attempt["attempt"], decode=DECODE)


class Rank:
    """Rank 0 as the front knows it, for tests that send each message themselves."""

    def __init__(
        self, output: Path, token: str | None = None, patience: float = 60.0, replica: str | None = None
    ) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, round(1000 * patience))
        folder = SocketFolder(output)
        self._socket.connect(folder.endpoint)
        self.token = folder.current_token() if token is None else token
        name = {} if replica is None else {"replica": replica}
        self.send("beat", ready=True, token=self.token, since=time.monotonic(), **name)
        assert self.receive()["kind"] == "welcome"

    def send(self, kind: str, *data: bytes, **facts: Any) -> None:
        self._socket.send_multipart([json.dumps({"kind": kind, **facts}).encode(), *data])

    def receive(self) -> dict[str, Any]:
        try:
            text, *data = self._socket.recv_multipart()
        except zmq.Again:
            raise AssertionError("the front sent nothing") from None
        return {**json.loads(text), **({"data": data} if data else {})}

    def start(self) -> str:
        """Begin the next attempt, and return its id."""
        attempt = str(self.receive()["attempt"])
        self.send("started", attempt=attempt)
        return attempt


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the database's write lock, as another process, such as a backup, would."""
    other = sqlite3.connect(output / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def rank_settings(model: Path, output: Path) -> RankSettings:
    return RankSettings(
        model,
        output,
        torch.float32,
        torch.float32,
        1,
        1,
        "auto",
        None,
        None,
        offload=False,
        decode_batch=4,
        warmup=None,
    )


def front_settings(model: Path, **options: Any) -> FrontSettings:
    """Settings of a front that only this machine reaches, without a key. `options` replaces settings and limits."""
    limited = {name: options.pop(name) for name in [*options] if name in Limits.__dataclass_fields__}
    front = FrontSettings(
        "tiny", Pipeline.read(model), "127.0.0.1", free_port(), None, Limits(**{"body": 2**20, **limited}),
        expire_after=3600.0, max_output=None, allow_url_inputs=False,
    )  # fmt: skip
    return replace(front, **options)


@contextmanager
def served(
    model: Path, output: Path, stub: bool = True,
    restart: Callable[[str, float], bool] = lambda reason, seconds: False, drain: float = 0.0,
    fleet: Fleet | None = None, **options: Any,
) -> Iterator[tuple[str, StubRanks | None]]:  # fmt: skip
    """Run a front for a model's folder, and yield its URL and its stub ranks; None without `stub`.

    It ends as after a SIGTERM, with `drain` as its `--drain-timeout`.
    """
    output.mkdir(exist_ok=True)
    ranks = rank_settings(model, output)
    front = front_settings(model, **options)
    app = make_app(ranks, front, restart=restart, fleet=fleet)
    server = HttpServer(app, drain, lambda text: None, host=front.host, port=front.port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    stub_ranks = StubRanks(output) if stub else None

    def end() -> None:
        server.handle_exit(signal.SIGTERM, None)

    if stub_ranks is not None:
        stub_ranks.end_server = end
    try:
        yield f"http://127.0.0.1:{front.port}", stub_ranks
    finally:
        end()
        thread.join()
