"""What a server was started with."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from halovae.grid import Grid
from halovae.pipelines.specs import Pipeline
from halovae.runtime.sharing import Mode


@dataclass(frozen=True)
class RankSettings:
    """What every rank has to know.

    Attributes:
        model: the pipeline's folder.
        output: where the jobs and their results are kept.
        dtype: of the transformer and the text encoder; likewise `vae_dtype`.
        ulysses: degree of sequence parallelism by heads; likewise `ring`, in turns.
        vae_mode: how ranks share a decode, or an encode.
        vae_grid: how they share a decode, instead.
        memory_budget: of a decode, in bytes.
        offload: keep all but the VAE in the host's memory.
        decode_batch: how many latents may be decoded at once.
        warmup: width, height and frames to generate once before the first request.
    """

    model: Path
    output: Path
    dtype: torch.dtype
    vae_dtype: torch.dtype
    ulysses: int
    ring: int
    vae_mode: Mode
    vae_grid: Grid | None
    memory_budget: int | None
    offload: bool
    decode_batch: int
    warmup: tuple[int, int, int] | None

    @property
    def results(self) -> Path:
        """Where finished files go: a folder of the server's own, as `output` may hold other programs' files."""
        return self.output / "results"

    @property
    def endpoint(self) -> str:
        """Where the front and rank 0 meet: a socket of this host, whose name must be short (107 bytes on Linux)."""
        name = hashlib.sha256(str(self.output).encode()).hexdigest()[:16]
        return f"ipc://{tempfile.gettempdir()}/halovae-{name}"


@dataclass(frozen=True)
class FrontSettings:
    """What the front has to know besides.

    Attributes:
        name: the model's, for clients.
        pipeline: what it makes.
        host: to listen on; likewise `port`.
        api_key: what clients have to send; None for nothing.
        max_queue: how many jobs may wait.
        max_body: the largest request in bytes.
        expire_after: seconds that finished files are kept.
        max_output: bytes that finished files may take together; the oldest go first.
        allow_url_inputs: whether `reference_url` is fetched.
    """

    name: str
    pipeline: Pipeline
    host: str
    port: int
    api_key: str | None
    max_queue: int
    max_body: int
    expire_after: float
    max_output: int | None
    allow_url_inputs: bool
