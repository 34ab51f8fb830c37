"""The options of `halovae serve`, and the settings that they become."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from halovae.cli.common import Dtype, degrees, parse_bytes, parsed
from halovae.cli.serve_checks import (
    KEY,
    WEBHOOK_SECRET,
    check_certificate,
    key_of,
    parse_grid,
    parse_hosts,
    parse_origins,
    parse_replicas,
    parse_root,
    parse_warmup,
    webhook_of,
)
from halovae.distributed.launch import under_torchrun
from halovae.distributed.ray_cluster import address_of
from halovae.distributed.transport import world_size
from halovae.pipelines.specs import Pipeline, find_pipeline
from halovae.runtime.options import Mode

if TYPE_CHECKING:
    from halovae.serving.limits import Limits
    from halovae.serving.settings import FrontSettings, LogFormat, LogLevel, RankSettings, ReplicaSettings

_VAE_MODES: dict[str, Mode] = {"auto": "auto", "on": "parallel", "off": "single"}
_LOG_FORMATS: dict[str, LogFormat] = {"text": "text", "json": "json"}
_LOG_LEVELS: dict[str, LogLevel] = {"debug": "debug", "info": "info", "warning": "warning", "error": "error"}
# Options by their group in the help.
_replicas, _access, _network, _limits, _operation, _files = (
    partial(typer.Option, rich_help_panel=group)
    for group in ("Replicas", "Who gets in", "Network", "Limits", "Operation", "Files")
)


@dataclass(frozen=True)
class ServeOptions:
    """What a user gives to `halovae serve`."""

    model_path: Annotated[str, typer.Option(help="Folder of a pipeline in diffusers layout, or a hub id.")]
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag, or commit of a hub id. Only a commit always names the same files."),
    ] = None
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="How many ranks to start here, or in each replica.", show_default="1")
    ] = None
    sp_degree: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that share the transformer's sequence: all, or 1.", show_default="all"),
    ] = None
    ulysses_degree: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of these, ranks that share attention by heads.", show_default="what --ring-degree leaves"
        ),
    ] = None
    ring_degree: Annotated[int, typer.Option(min=1, help="Ranks that share attention as a ring.")] = 1
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the transformer and the text encoder.")] = Dtype.bf16
    vae_precision: Annotated[Dtype, typer.Option(help="Dtype of the VAE.")] = Dtype.fp32
    vae_parallel: Annotated[
        str, typer.Option(help="Whether ranks share decodes and encodes: auto (where that is faster), on, or off.")
    ] = "auto"
    vae_grid: Annotated[
        str | None,
        typer.Option(help="Grid of a decode, as ROWSxCOLS. Takes the place of --vae-parallel."),
    ] = None
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory that a rank may take for a decode, such as 8GiB.", show_default="what is free"),
    ] = None
    cpu_offload: Annotated[
        bool,
        typer.Option("--cpu-offload", help="Keep unused models other than the VAE in the host's memory."),
    ] = False
    decode_batch: Annotated[int, typer.Option(min=1, help="How many results of one size to decode together.")] = 4
    warmup: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES to generate before the first request."),
    ] = None

    replicas: Annotated[
        str | None,
        _replicas(
            help="Groups of --num-gpus ranks on a Ray cluster: a number, or LEAST:MOST, which follows the queue.",
            show_default="one group, without Ray",
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        _replicas(help="A Ray cluster: auto, HOST, or HOST:PORT.", show_default="RAY_ADDRESS, or this host alone"),
    ] = None
    replica_idle: Annotated[
        float, _replicas(min=0.001, help="Seconds without a job after which a replica above LEAST is ended.")
    ] = 300.0

    api_key: Annotated[
        str | None,
        _access(
            envvar=KEY,
            help="Key that clients must send. `ps` shows it on a command line; the variable is safer.",
            show_default="none, on a loopback address only",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _access(
            help="File of further keys: NAME KEY on each line; # begins a comment. SIGHUP reads it again.",
            show_default="none",
        ),
    ] = None
    no_auth: Annotated[
        bool, _access("--no-auth", help="Let everyone who can reach --host use the server without a key.")
    ] = False
    trusted_hosts: Annotated[
        str | None,
        _access(
            help="Names that requests may call this server by, separated by commas; *.example.com for all below it.",
            show_default="with keys, all; without, its address",
        ),
    ] = None
    cors_origins: Annotated[
        str | None,
        _access(
            help="Origins whose pages may use the server, separated by commas, such as https://example.com.",
            show_default="none",
        ),
    ] = None
    private_endpoints: Annotated[
        bool, _access("--private-endpoints", help="Require a key for /metrics and /docs too.")
    ] = False
    allow_url_inputs: Annotated[
        bool, _access("--allow-url-inputs", help="Fetch pictures from URLs on the public internet.")
    ] = False

    host: Annotated[str, _network(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, _network(min=1, max=65535, help="Port to listen on.")] = 8080
    admin_port: Annotated[
        int | None,
        _network(
            min=1,
            max=65535,
            help="Port to which /metrics, /docs, and the details of /health move, without a key.",
            show_default="none",
        ),
    ] = None
    admin_host: Annotated[str, _network(help="Address of --admin-port.")] = "127.0.0.1"
    ssl_certfile: Annotated[
        Path | None, _network(help="Certificate in PEM format, to serve HTTPS.", show_default="none")
    ] = None
    ssl_keyfile: Annotated[Path | None, _network(help="The certificate's key.", show_default="in --ssl-certfile")] = (
        None
    )
    root_path: Annotated[str, _network(help="Path under which a proxy serves this server, such as /halovae.")] = ""
    forwarded_allow_ips: Annotated[
        str | None,
        _network(
            help="Addresses of proxies whose X-Forwarded headers count, separated by commas.", show_default="127.0.0.1"
        ),
    ] = None
    interface: Annotated[
        str | None,
        _network(
            help="Network interface that ranks of several hosts share, such as eth1; also of replicas and this server.",
            show_default="what GLOO_SOCKET_IFNAME and the like name",
        ),
    ] = None
    max_connections: Annotated[int, _network(min=1, help="Connections at a time.")] = 1000

    max_pixels: Annotated[int, _limits(min=1, help="Pixels of a frame or picture.")] = 4096 * 4096
    max_frames: Annotated[int, _limits(min=1, help="Frames of a video.")] = 1025
    max_steps: Annotated[int, _limits(min=1, help="Denoising steps.")] = 1000
    max_n: Annotated[int, _limits(min=1, max=10, help="Results of one job.")] = 10
    max_body: Annotated[str, _limits(help="Size limit of a request.")] = "64MiB"
    max_body_memory: Annotated[
        str, _limits(help="Memory that all requests may take together until they are queued; further ones get 503.")
    ] = "512MiB"
    max_queue: Annotated[int, _limits(min=1, help="How many jobs may wait; further ones get 429.")] = 100
    max_queue_per_key: Annotated[
        int | None, _limits(min=1, help="How many jobs of one key may wait.", show_default="no limit")
    ] = None
    rate_limit: Annotated[
        str | None,
        _limits(
            help="Submissions of a key, or of an address without keys, such as 30/minute; further ones get 429.",
            show_default="no limit",
        ),
    ] = None
    job_timeout: Annotated[
        float | None, _limits(min=0.001, help="How long a job may run, in seconds.", show_default="no limit")
    ] = None
    stall_timeout: Annotated[
        float, _operation(min=0.001, help="Seconds without progress after which ranks that have work are restarted.")
    ] = 600.0
    drain_timeout: Annotated[
        float, _operation(min=0, help="Seconds for which running jobs may go on when the server is asked to end.")
    ] = 30.0
    webhook_url: Annotated[
        str | None,
        _operation(
            help=f"URL to send an event to for each job that ends, signed with the secret in {WEBHOOK_SECRET}.",
            show_default="none",
        ),
    ] = None
    webhook_secret_file: Annotated[
        Path | None,
        _operation(help="File with the secret of --webhook-url: whsec_ and base64.", show_default=WEBHOOK_SECRET),
    ] = None
    log_format: Annotated[str, _operation(help="text, or json for one object on each line.")] = "text"
    log_level: Annotated[str, _operation(help="The least that is logged: debug, info, warning, or error.")] = "info"
    log_prompts: Annotated[bool, _operation("--log-prompts", help="Write prompts to the log.")] = False

    output_dir: Annotated[Path, _files(help="Folder for jobs; finished files go to results/.")] = Path("outputs")
    expire_after: Annotated[float, _files(min=0.001, help="How long finished files are kept, in hours.")] = 24.0
    max_output: Annotated[
        str | None, _files(help="Size limit of all finished files; the oldest go first.", show_default="no limit")
    ] = None

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        if under_torchrun() and self.replicas is not None:
            raise ValueError(
                f"--replicas {self.replicas}, but torchrun has started this: Ray places ranks, omit torchrun"
            )
        ranks = self.num_gpus or (world_size() if under_torchrun() else 1)
        if under_torchrun() and ranks != world_size():
            raise ValueError(f"--num-gpus {ranks}, but torchrun has started {world_size()} ranks: omit it")
        return ranks

    def settings(self) -> tuple[RankSettings, FrontSettings]:
        """Return the settings of the ranks and of the front, and make the output folder.

        Raises:
            ValueError: an option is wrong; the message names it.
            OSError: a file or folder cannot be used.
        """
        from halovae.serving.settings import FrontSettings, RankSettings

        key = key_of(self)
        ranks = self.ranks
        ulysses, ring = degrees(ranks, self.sp_degree, self.ulysses_degree, self.ring_degree)
        if self.vae_parallel not in _VAE_MODES:
            raise ValueError(f"--vae-parallel {self.vae_parallel}: expected {', '.join(_VAE_MODES)}")
        grid = parsed("--vae-grid", self.vae_grid, parse_grid) if self.vae_grid else None
        if grid is not None and grid.size not in (1, ranks):
            raise ValueError(f"--vae-grid {self.vae_grid}: expected a grid of all {ranks} ranks, or 1x1")
        memory_budget = parsed("--memory-budget", self.memory_budget, parse_bytes) if self.memory_budget else None
        if self.log_format not in _LOG_FORMATS:
            raise ValueError(f"--log-format {self.log_format}: expected {', '.join(_LOG_FORMATS)}")
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"--log-level {self.log_level}: expected {', '.join(_LOG_LEVELS)}")
        front: dict[str, Any] = {
            "limits": self._limits(),
            "trusted_hosts": parsed("--trusted-hosts", self.trusted_hosts or "", parse_hosts),
            "cors_origins": parsed("--cors-origins", self.cors_origins or "", parse_origins),
            "root_path": parsed("--root-path", self.root_path, parse_root),
            "webhook": webhook_of(self.webhook_url, self.webhook_secret_file),
            "max_output": parsed("--max-output", self.max_output, parse_bytes) if self.max_output else None,
            "replicas": self._replicas(ranks),
        }
        has_keys = key is not None or self.api_key_file is not None
        if self.private_endpoints and not has_keys:
            raise ValueError(f"--private-endpoints without keys: give --api-key-file, --api-key, or {KEY}")
        if self.admin_port is None and self.admin_host != "127.0.0.1":
            raise ValueError(f"--admin-host {self.admin_host} without --admin-port: give both")
        if self.private_endpoints and self.admin_port is not None:
            raise ValueError(
                f"--private-endpoints, but --admin-port {self.admin_port} serves these routes without a key: omit one"
            )
        if "*" in front["cors_origins"] and not has_keys:
            raise ValueError(
                "--cors-origins *: without keys, every page in a browser could use the server; name origins"
            )
        check_certificate(self.ssl_certfile, self.ssl_keyfile)
        folder = find_pipeline(self.model_path, self.revision)
        pipeline = replace(Pipeline.read(folder), sharing=ulysses * ring)
        output = self.output_dir.absolute()
        output.mkdir(parents=True, exist_ok=True)
        return RankSettings(
            model=folder,
            output=output,
            dtype=self.dtype.torch,
            vae_dtype=self.vae_precision.torch,
            ulysses=ulysses,
            ring=ring,
            vae_mode=_VAE_MODES[self.vae_parallel],
            vae_grid=grid,
            memory_budget=memory_budget,
            offload=self.cpu_offload,
            decode_batch=self.decode_batch,
            warmup=parsed("--warmup", self.warmup, parse_warmup) if self.warmup else None,
            log_format=_LOG_FORMATS[self.log_format],
            log_level=_LOG_LEVELS[self.log_level],
        ), FrontSettings(
            name=Path(self.model_path).name if Path(self.model_path).is_dir() else self.model_path,
            pipeline=pipeline,
            host=self.host,
            port=self.port,
            api_key=key,
            expire_after=self.expire_after * 3600,
            **{name: getattr(self, name) for name in _SAME},
            **front,
        )  # fmt: skip

    def _replicas(self, ranks: int) -> ReplicaSettings | None:
        from halovae.serving.settings import ReplicaSettings

        if self.replicas is None:
            if self.ray_address is not None:
                raise ValueError(f"--ray-address {self.ray_address} without --replicas: give both")
            return None
        least, most = parsed("--replicas", self.replicas, parse_replicas)
        if self.interface is not None:
            parsed("--interface", self.interface, address_of)
        model = str(Path(self.model_path).absolute()) if Path(self.model_path).is_dir() else self.model_path
        return ReplicaSettings(
            least, most, ranks, model, self.revision, self.ray_address, self.interface, self.replica_idle
        )

    def _limits(self) -> Limits:
        from halovae.serving.limits import Limits
        from halovae.serving.rates import Rates

        if self.rate_limit is not None:
            parsed("--rate-limit", self.rate_limit, Rates)
        return Limits(
            body=parsed("--max-body", self.max_body, parse_bytes),
            body_memory=parsed("--max-body-memory", self.max_body_memory, parse_bytes),
            pixels=self.max_pixels, frames=self.max_frames, steps=self.max_steps, results=self.max_n,
            job_seconds=self.job_timeout, queue=self.max_queue, queue_per_key=self.max_queue_per_key,
            rate=self.rate_limit,
        )  # fmt: skip


# Options that are settings of the front as they are.
_SAME = (
    "allow_url_inputs", "stall_timeout", "drain_timeout", "api_key_file", "forwarded_allow_ips", "ssl_certfile",
    "ssl_keyfile", "private_endpoints", "admin_host", "admin_port", "max_connections", "log_prompts",
)  # fmt: skip


def takes_options(run: Callable[[ServeOptions], None]) -> Callable[..., None]:
    """Return a command for typer with an option for each field of `ServeOptions`, which `run` gets."""

    def command(**options: Any) -> None:
        run(ServeOptions(**options))

    hints = get_type_hints(ServeOptions, include_extras=True)
    parameters = inspect.signature(ServeOptions).parameters.values()
    typed = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    command.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command
