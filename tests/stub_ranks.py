"""A front over HTTP, and ranks that only pretend: they write frames without any model."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image

from halovae.io import media
from halovae.pipelines.specs import Pipeline
from halovae.serving.app import make_app
from halovae.serving.line import RankLine
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
    """Serves orders like rank 0; while `held` is set it stays at the first step, and orders fail if it `fails`."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self.line = RankLine(endpoint)
        self.line.ready = True
        self.held = threading.Event()
        self.fails = False
        self.seen: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        while True:
            order = self.line.orders.get()
            self.seen.append(order)
            self.line.tell("started", order["order"])
            self.line.tell("progress", order["order"], stage="denoising", done=1)
            if order["preview_every"] == 1:
                self.line.tell("preview", order["order"], step=1, picture=base64.b64encode(PREVIEW).decode())
            while self.held.is_set() and order["order"] not in self.line.cancelled:
                time.sleep(0.01)
            if order["order"] in self.line.cancelled:
                self.line.tell("cancelled", order["order"])
                continue
            if self.fails:
                self.line.tell("failed", order["order"], code="out_of_memory", message="no plan fits")
                continue
            self.line.tell("denoised", order["order"], seconds=0.1)
            width, height = (min(side, 64) for side in order["prompt"]["size"])  # however much a fuzzer asks for
            frames = torch.zeros(3, min(order["prompt"]["frames"], 5), height, width, dtype=torch.uint8)
            for path in order["paths"]:
                sink = media.Sink(Path(path), order["fps"])
                sink.write(frames)
                sink.close(whole=True)
            self.line.tell("progress", order["order"], stage="decoding", done=frames.shape[1])
            self.line.tell("finished", order["order"], decode=DECODE)


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
    """For one machine and everyone on it, but for what `options` say."""
    front = FrontSettings(
        "tiny", Pipeline.read(model), "127.0.0.1", free_port(), None, max_queue=100, max_body=2**20,
        expire_after=3600.0, max_output=None, allow_url_inputs=False,
    )  # fmt: skip
    return replace(front, **options)


@contextmanager
def served(model: Path, output: Path, stub: bool = True, **options: Any) -> Iterator[tuple[str, StubRanks | None]]:
    """A front for a model's folder: its URL, and its ranks."""
    output.mkdir(exist_ok=True)
    ranks = rank_settings(model, output)
    front = front_settings(model, **options)
    config = uvicorn.Config(
        make_app(ranks, front), front.host, front.port, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{front.port}", StubRanks(ranks.endpoint) if stub else None
    finally:
        server.should_exit = True
        thread.join()
