"""The settings that a server was started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from halovae.grid import Grid
from halovae.pipelines.specs import Pipeline
from halovae.runtime.options import Mode
from halovae.serving.limits import Limits

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class RankSettings:
    """The settings that the ranks and the front share.

    Attributes:
        model: the pipeline's folder.
        output: the folder of the jobs and their results.
        dtype: dtype of the transformer and the text encoder.
        vae_dtype: dtype of the VAE.
        ulysses: degree of sequence parallelism by attention heads.
        ring: degree of ring attention.
        vae_mode: how ranks share decodes and encodes.
        vae_grid: the grid of decodes; it takes the place of `vae_mode` for them.
        memory_budget: bytes that a decode may take on a rank.
        offload: whether all models but the VAE are kept in the host's memory while they are not used.
        decode_batch: how many latents may be decoded at once.
        warmup: width, height, and number of frames to generate once before the first request; None for no warmup.
        log_format: "text", or "json" for one object on each line.
        log_level: the least that halovae's own logs hold. Those of libraries hold warnings and errors.
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
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"

    @property
    def results(self) -> Path:
        """The folder of finished files. Only the server uses it; `output` may hold files of other programs."""
        return self.output / "results"


@dataclass(frozen=True)
class Webhook:
    """Where events about jobs go.

    Attributes:
        url: receives them by POST.
        secret: what they are signed with.
    """

    url: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ReplicaSettings:
    """Groups of ranks that Ray places.

    Attributes:
        least, most: how many groups there are; their number follows the queue.
        ranks: of each group.
        model: the pipeline as the user named it: each host looks for it.
        revision: of a hub id.
        address: Ray's, as of `ray_cluster.connect`.
        interface: the network interface that hosts share; None for the one by which Ray's nodes reach each other.
        idle: seconds without a job after which a group is ended, if there are more than `least`.
        device: the resource of Ray that a rank takes; None for the cluster's.
    """

    least: int
    most: int
    ranks: int
    model: str
    revision: str | None = None
    address: str | None = None
    interface: str | None = None
    idle: float = 300.0
    device: str | None = None


@dataclass(frozen=True)
class FrontSettings:
    """The settings that only the front needs.

    Attributes:
        name: the model's name for clients.
        pipeline: describes what the model can make.
        host, port: the address to listen on.
        api_key: a key that clients may send; None for no key.
        limits: the most that requests and clients may take.
        expire_after: how long finished files are kept, in seconds.
        max_output: bytes that finished files may take together; the oldest are deleted first. None for no limit.
        allow_url_inputs: whether `reference_url` is fetched.
        stall_timeout: seconds without progress after which ranks that have work are restarted.
        drain_timeout: seconds for which running jobs may go on once the server is asked to end.
        api_key_file: a file of further keys that clients may send, one of which they must send if there are any.
        trusted_hosts: names that requests may call this server by. Without any, a server with keys takes all names, and
            one without keys its address and those of this machine.
        cors_origins: origins whose pages may use the server from a browser.
        root_path: the path under which a proxy serves this server.
        forwarded_allow_ips: addresses of proxies whose `X-Forwarded` headers count, separated by commas; None for this
            machine's.
        ssl_certfile, ssl_keyfile: the certificate and its key, for HTTPS.
        private_endpoints: whether the routes for operators require a key.
        admin_host, admin_port: another address, to which the routes for operators move; None for none.
        max_connections: connections at a time.
        log_prompts: whether the log holds prompts.
        webhook: told of each job that ends; None for nobody.
        replicas: groups of ranks that Ray places; None for one group without Ray.
    """

    name: str
    pipeline: Pipeline
    host: str
    port: int
    api_key: str | None
    limits: Limits
    expire_after: float
    max_output: int | None
    allow_url_inputs: bool
    stall_timeout: float = 600.0
    drain_timeout: float = 30.0
    api_key_file: Path | None = None
    trusted_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    forwarded_allow_ips: str | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    private_endpoints: bool = False
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    max_connections: int = 1000
    log_prompts: bool = False
    webhook: Webhook | None = None
    replicas: ReplicaSettings | None = None

    def url(self, of_all: str = "localhost") -> str:
        """Return the URL of the page. `of_all` is the host's name where the server listens on all addresses."""
        host = of_all if self.host in ("", "0.0.0.0", "::") else self.host
        address = f"[{host}]" if ":" in host else host
        return f"{'https' if self.ssl_certfile else 'http'}://{address}:{self.port}{self.root_path}"
