"""`halovae dataset`: encode and decode whole datasets of clips and pictures, on Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from halovae import __version__
from halovae.cli.common import (
    MODEL_HELP,
    Dtype,
    check_installed,
    console,
    errors_shown,
    fail,
    parse_bytes,
    parse_size,
    parsed,
    results_console,
)  # fmt: skip
from halovae.cli.dataset_plan import plan
from halovae.cluster import run
from halovae.cluster.facts import Facts, revision_of
from halovae.cluster.rules import Bucket, Rules, buckets_like, parse_buckets
from halovae.cluster.sources import Listing, listed, whole_path
from halovae.cluster.writing import Output
from halovae.models.load import find_model

app = typer.Typer(help="Encode and decode whole datasets of clips and pictures, on Ray Data.", no_args_is_help=True)
app.command()(plan)


class Format(str, Enum):
    """The files that samples are written to."""

    safetensors = "safetensors"
    parquet = "parquet"
    webdataset = "webdataset"


class Store(str, Enum):
    """What is stored of the distribution that an encoder makes."""

    mean = "mean"
    sample = "sample"
    both = "both"


MaxRejected = Annotated[
    str | None, typer.Option(help="End if more inputs are rejected: a number, or a share such as 1%.")
]
RetryRejected = Annotated[bool, typer.Option("--retry-rejected", help="Try again what earlier runs rejected.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="HOST or HOST:PORT of a Ray cluster, or auto.", show_default="RAY_ADDRESS, or this host"),
]


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a glob, a .csv, .parquet or .jsonl manifest, or a .tar; a path or a URL such as s3://...",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for samples; a path or a URL.")],
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP} Every host needs it.")],
    format_: Annotated[
        Format, typer.Option("--format", help="safetensors: a file a sample. Others: --shard-size samples a file.")
    ] = Format.safetensors,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT to scale and crop to.", show_default="each input's, cropped a little"),
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(
            help="Several WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, comma-separated: inputs go where their aspect ratio is "
            "closest. auto: all aspect ratios with the area of --size."
        ),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            help="Frames of each clip, or several such numbers, comma-separated: each clip is as long as it can be.",
            show_default="all frames of a video are one clip",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames per second to take of videos.", show_default="all")
    ] = None,
    max_clips_per_video: Annotated[
        int | None, typer.Option(min=1, help="Clips of one video.", show_default="all")
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="The manifest's column with paths.", show_default="path, ...")
    ] = None,
    store: Annotated[
        Store, typer.Option(help="The mean of the latents' distribution, a sample of it, or mean and deviation.")
    ] = Store.mean,
    normalized: Annotated[
        bool, typer.Option("--normalized/--raw", help="Latents as pipelines have them, or as the VAE makes them.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation, and of what is stored.")] = Dtype.fp32,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples of one size to encode at once.", show_default="1, or 8 pictures")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a file of parquet or webdataset.")] = 64,
    max_rejected: MaxRejected = None,
    retry_rejected: RetryRejected = False,
    max_source_size: Annotated[str, typer.Option(help="Reject files that are larger.")] = "8GiB",
    verify: Annotated[bool, typer.Option("--verify", help="Read all samples back in the end.")] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Encoders.", show_default="one a device, or one for two CPUs")
    ] = None,
    ranks_per_actor: Annotated[
        int, typer.Option(min=1, help="Devices that share each encode, for clips that are too large for one.")
    ] = 1,
    ray_address: RayAddress = None,
) -> None:
    """Encode a dataset to latents, each sample exactly once.

    A run that was ended goes on where it stopped: give the same command again. OUTPUT has the samples, manifest.jsonl
    with a line for each, rejected.jsonl with what could not be read and why, and dataset.json with the options.
    """
    with errors_shown():
        _check_installed()
        facts = Facts.read(find_model(model))
        rules = Rules(
            facts,
            _buckets(size, buckets, facts),
            parsed("--frames", frames, _numbers) if frames else (),
            fps,
            max_clips_per_video or (None if facts.clips else 1),
            parsed("--max-source-size", max_source_size, parse_bytes),
        )
        listing = listed(source, path_column)
        common = {
            "family": facts.family, "revision": facts.revision, "dtype": dtype.value, "halovae": __version__,
            "store": store.value, "normalized": normalized,
        }  # fmt: skip
        settings = {
            "source": listing.root, "format": format_.value, "buckets": rules.buckets, "frames": rules.frames,
            "fps": fps, "max_clips_per_video": rules.most, **common,
        }  # fmt: skip
        del settings["halovae"]  # another version goes on; each line says which one made it
        encoder: dict[str, Any] = {
            "model": _for_workers(model), "dtype": dtype.value, "store": store.value, "normalize": normalized,
            "batch_size": batch_size or (1 if facts.clips else 8), "ranks": ranks_per_actor,
        }  # fmt: skip
        output = whole_path(output)
        made = Output(output, format_.value, dtype.value, common, normalized)
        stages = run.encoding(rules, made, encoder, shard_size)
        _run(
            listing, stages, output, settings, run.Workers(actors, ranks_per_actor), max_rejected, retry_rejected,
            verify, ray_address,
        )  # fmt: skip


@app.command()
def decode(
    source: Annotated[
        str,
        typer.Argument(help="A folder that `halovae dataset encode` wrote, a folder of latents files, or a glob."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for videos and pictures; a path or a URL.")],
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP} Every host needs it.")],
    fps: Annotated[float | None, typer.Option(min=0.01, help="Of videos.", show_default="the latents', or 16")] = None,
    normalized: Annotated[
        bool | None,
        typer.Option("--normalized/--raw", help="Whether latents are as pipelines have them.", show_default="by files"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    max_rejected: MaxRejected = None,
    retry_rejected: RetryRejected = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all files back in the end.")] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Decoders.", show_default="one a device, or one for two CPUs")
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Decode a dataset of latents: clips to mp4, single frames to png, each exactly once.

    A run that was ended goes on where it stopped. OUTPUT has manifest.jsonl, rejected.jsonl, and dataset.json, too.
    """
    with errors_shown():
        _check_installed()
        from halovae.cluster.decode import decoding

        path = find_model(model)
        listing = listed(source, suffixes=(".safetensors", ".parquet", ".tar"))
        settings = {
            "revision": revision_of(path), "dtype": dtype.value, "source": listing.root, "format": "mp4", "fps": fps,
            "normalized": normalized,
        }  # fmt: skip
        output = whole_path(output)
        decoder = {"model": _for_workers(model), "dtype": dtype.value, "normalized": normalized}
        stages = decoding(output, decoder, fps)
        _run(listing, stages, output, settings, run.Workers(actors), max_rejected, retry_rejected, verify, ray_address)


def _for_workers(model: str) -> str:
    """A model as workers find it, who run in other folders: the path of what is here, or the hub id."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _check_installed() -> None:
    check_installed("halovae dataset", "ray", "pyarrow", "diffusers", extra="ray,diffusers")


def _run(
    listing: Listing, stages: run.Stages, output: str, settings: dict[str, Any], workers: run.Workers,
    max_rejected: str | None, retry_rejected: bool, verify: bool, ray_address: str | None,
) -> None:  # fmt: skip
    parsed("--max-rejected", max_rejected or "0", lambda text: run.allowed(text, len(listing.items)))
    console.print(f"{len(listing.items):,} inputs; starting Ray", highlight=False)
    run.connect(ray_address)
    try:
        with _shown(len(listing.items)) as on_progress:
            progress = run.run_dataset(
                listing, stages, output, settings, workers, on_progress, most_rejected=max_rejected,
                retry_rejected=retry_rejected,
            )  # fmt: skip
    except run.TooManyRejectedError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)
    results_console().print(_report(progress, output))
    if verify:
        whole, damaged = run.verify(output, settings)
        for reason in damaged[:20]:
            console.print(reason, soft_wrap=True, highlight=False)
        if damaged:
            fail(f"{len(damaged)} samples are damaged; the same command makes them again", 1)
        console.print(f"verified: {whole:,} samples are as they were written", highlight=False)


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) for word in words):
        raise ValueError("expected numbers of frames >= 1, such as 81 or 81,49,17")
    return tuple(map(int, words))


def _buckets(size: str | None, buckets: str | None, facts: Facts) -> tuple[Bucket, ...]:
    chosen = parsed("--size", size, parse_size) if size else None
    if buckets == "auto":
        if chosen is None:
            raise ValueError("--buckets auto: expected --size with it, which gives the area")
        return buckets_like(chosen, max(64, facts.spatial))
    if buckets and chosen:
        raise ValueError("--size and --buckets both give sizes: leave one out")
    if buckets:
        return parsed("--buckets", buckets, parse_buckets)
    return (Bucket(*chosen),) if chosen else ()


@contextmanager
def _shown(inputs: int) -> Iterator[Callable[[run.Progress], None]]:
    """Show how far a run is on standard error."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=inputs, more="inputs, starting")

        def on_progress(now: run.Progress) -> None:
            left = "" if now.left_s is None else f", {now.left_s / 60:,.0f} min left"
            rate = now.frames / max(1e-9, now.seconds)
            busy = ", ".join(f"{stage} {now.used(stage):.0%}" for stage in run.STAGES)
            more = f"inputs, {now.samples:,} samples, {rate:,.1f} frames/s, {now.rejected} rejected{left}; {busy}"
            bar.update(task, completed=now.finished, more=more)

        yield on_progress


def _report(progress: run.Progress, output: str) -> Table | str:
    """A table of what the stages took, with a summary; the summary alone if there was nothing to do."""
    names = {"read": "reading", "decode": "decoding files", "encode": "the model", "write": "writing"}
    rate = progress.frames / progress.seconds if progress.seconds else 0.0
    summary = (
        f"{output}: {progress.before + progress.samples:,} samples ({progress.samples:,} new), "
        f"{progress.rejected:,} rejected, of {progress.inputs:,} inputs"
    )
    if not progress.seconds:
        return summary
    table = Table(title=summary, title_justify="left")
    for column in ("stage", "workers", "busy (s)", "busy"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in run.STAGES:
        workers = progress.encoders if stage == "encode" else progress.cpus
        table.add_row(names[stage], f"{workers:g}", f"{progress.busy[stage]:,.1f}", f"{progress.used(stage):.0%}")
    if progress.samples:
        bound = names.get(progress.bound, "no stage: workers waited, most of all for Ray to start them")
        table.caption = (
            f"{progress.frames:,} frames in {progress.seconds:,.1f} s: {rate:,.1f} frames/s, "
            f"{rate / max(1, progress.encoders):,.1f} by each of {progress.encoders} actors; bound by {bound}"
        )
    return table
