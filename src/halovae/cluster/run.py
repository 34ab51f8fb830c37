"""Run a dataset through Ray Data: read on CPUs, encode or decode on actors, write, and note what is done."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from filelock import FileLock, Timeout

from halovae.cluster.encode import EncodeRows
from halovae.cluster.journal import Journal, Line
from halovae.cluster.reading import Row, read
from halovae.cluster.rules import Rules
from halovae.cluster.sources import Item, Listing
from halovae.cluster.writing import NAMES, Output, damage, write
from halovae.distributed import ray_cluster
from halovae.errors import HalovaeError

_BLOCK = 8  # inputs that one task reads, one after the other
_BLOCKS = 10_000  # at most
# What tasks ask for. A node's CPUs have to suffice for one of each kind, and for encoders that come from a lost node:
# else none of them gets anything to encode. So encoders on the CPU ask for less than they use.
_ENCODER_CPUS, _WRITING_CPUS = 0.25, 0.25
STAGES = ("read", "decode", "encode", "write")


class TooManyRejectedError(HalovaeError, RuntimeError):
    """More inputs were rejected than the command allows. What is done stays done."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        inputs: files of the dataset.
        skipped: of these, files that earlier runs finished.
        before: samples of earlier runs.
        finished: files whose samples are all there or rejected, those of earlier runs included.
        samples: samples of this run.
        rejected: rejections, earlier runs included.
        frames: encoded frames of this run.
        seconds: since the first task could start.
        busy: seconds that all workers together spent in each stage.
        encoders: how many actors encode.
        cpus: how many tasks can read and write at once.
    """

    inputs: int
    skipped: int
    before: int
    rejected: int
    encoders: int
    cpus: float
    finished: int = 0
    samples: int = 0
    frames: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def used(self, stage: str) -> float:
        """Which share of the time a stage's workers were busy; reading, decoding, and writing share theirs."""
        workers = self.encoders if stage == "encode" else self.cpus
        return self.busy[stage] / max(1e-9, self.seconds * workers)

    @property
    def bound(self) -> str:
        """The stage that bounds throughput, or "waiting" if no workers were busy half of the time."""
        feeding = sum(self.used(stage) for stage in STAGES if stage != "encode")
        if max(feeding, self.used("encode")) < 0.5:
            return "waiting"
        if self.used("encode") >= feeding:
            return "encode"
        return max(("read", "decode", "write"), key=self.used)

    @property
    def left_s(self) -> float | None:
        """Predicted seconds to the end; None before anything is finished."""
        rate = (self.finished - self.skipped) / max(1e-9, self.seconds)
        return (self.inputs - self.finished) / rate if rate else None


@dataclass(frozen=True)
class Workers:
    """Who encodes.

    Attributes:
        encoders: actors; None for as many as there are devices, or half the CPUs.
        ranks: devices of each.
    """

    encoders: int | None = None
    ranks: int = 1

    def resources(self, cluster: Mapping[str, float]) -> tuple[int, dict[str, Any], float]:
        """How many actors, what each asks for, and the CPUs that are left, in a cluster with these resources."""
        cpus = cluster.get("CPU", 1.0)
        for name in ("GPU", "NPU"):
            if devices := int(cluster.get(name, 0)):
                most = devices // self.ranks
                if not most:
                    raise ValueError(f"ranks {self.ranks}: the cluster has {devices} devices ({name})")
                asked = {"num_gpus": self.ranks} if name == "GPU" else {"resources": {name: self.ranks}}
                return min(self.encoders or most, most), {**asked, "num_cpus": 0}, cpus
        count = self.encoders or max(1, int(cpus / 2) // self.ranks)
        return count, {"num_cpus": _ENCODER_CPUS}, max(0.5, cpus - count * self.ranks)


def reading_cpus(nodes: Sequence[float]) -> float:
    """What a task that reads asks for: one CPU, or half of the smallest node's, so that others fit there, too."""
    return min(1.0, min([cpus for cpus in nodes if cpus], default=2.0) / 2)


def connect(address: str | None) -> None:
    """Join a cluster, or start Ray on this host, as `ray_cluster.connect` does, with Ray Data's log silenced."""
    ray_cluster.connect(address)
    import_module("ray.data")  # sets up its log
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Stages:
    """What is done with a dataset.

    Attributes:
        read: makes rows of a batch with one file: its samples, or why there are none.
        worker: the class of the actors, which encode or decode batches of such rows.
        options: of the class.
        batch: how many rows it gets at once.
        write: writes a batch of what the actors make, and returns lines and seconds.
        shard: how many rows it gets at once; None for those of a block.
    """

    read: Callable[[Mapping[str, Sequence[str]]], Iterator[Row]]
    worker: type
    options: Mapping[str, Any]
    batch: int
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    shard: int | None = None


def encoding(rules: Rules, output: Output, encoder: Mapping[str, Any], shard: int) -> Stages:
    """The stages of an encode.

    Args:
        rules: how files become clips.
        output: where samples go.
        encoder: options of `Encode`.
        shard: how many samples one file has, in formats that have several.
    """
    options = {"dims": 4 if rules.facts.framed else 3, **encoder}
    alike = rules.facts.clips or len(rules.buckets) == 1
    batch = encoder["batch_size"] * (1 if alike else 4)  # of several sizes, each is to fill a batch
    several = shard if output.format != "safetensors" else None
    return Stages(partial(read, rules=rules), EncodeRows, options, batch, partial(write, output=output), several)


def run_dataset(
    listing: Listing, stages: Stages, folder: str, settings: Mapping[str, Any], workers: Workers,
    on_progress: Callable[[Progress], None], *, most_rejected: str | None = None, retry_rejected: bool = False,
) -> Progress:  # fmt: skip
    """Do what is not done yet.

    Args:
        listing: the files.
        stages: what is done with them.
        folder: where samples go.
        settings: what all samples of the folder share; a later run has to have the same. `format` is one of them.
        workers: who encodes or decodes.
        on_progress: called when samples are done.
        most_rejected: how many inputs may be rejected: a number, or a share such as "1%"; None for any number.
        retry_rejected: whether to try again what an earlier run rejected.

    Raises:
        TooManyRejectedError: more are.
        ValueError: the folder has samples that were made otherwise, or another run writes to it.
    """
    limit = allowed(most_rejected, len(listing.items))
    with journal_of(folder, settings) as journal:
        if retry_rejected:
            journal.retry_rejected()
        journal.sweep()
        left = [item for item in listing.items if not journal.is_complete(item.path)]
        skipped = len(listing.items) - len(left)
        progress = Progress(
            len(listing.items), skipped, journal.samples, journal.refused, encoders=0, cpus=0.0, finished=skipped
        )
        _check_rejected(progress, limit)
        if left:
            for lines, seconds in _results(left, journal, stages, workers, progress):
                new = journal.add(lines)
                progress.finished += sum(journal.is_complete(item) for item in {line["item"] for line in new})
                progress.samples += sum("reason" not in line for line in new)
                progress.frames += sum(line["frames"] for line in new if "reason" not in line)
                progress.rejected = journal.refused
                for stage in STAGES:
                    progress.busy[stage] += seconds[stage]
                on_progress(progress)
                _check_rejected(progress, limit)
            journal.sweep()
        return progress


@contextmanager
def journal_of(folder: str, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """Open a dataset's folder for one run at a time, as far as it is local."""
    journal = Journal(folder, settings, NAMES[settings["format"]])
    lock = FileLock(journal.store.path(".lock"), timeout=0) if journal.store.local else nullcontext()
    try:
        with lock:
            journal.read()
            yield journal
    except Timeout as error:
        raise ValueError(f"output {folder}: another run writes to it") from error


def allowed(text: str | None, inputs: int) -> float:
    """How many rejections a number or a share allows.

    Raises:
        ValueError: the text is neither.
    """
    if text is None:
        return float("inf")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text!r}: expected a number of inputs, or a share such as 1%")
    return number * inputs / 100 if text.endswith("%") else number


def _check_rejected(progress: Progress, limit: float) -> None:
    if progress.rejected > limit:
        raise TooManyRejectedError(
            f"{progress.rejected} of {progress.inputs} inputs are rejected, more than {limit:g}: rejected.jsonl has "
            "the reasons. What is encoded stays; a later run goes on, with the rejected ones left out"
        )


def _results(
    left: Sequence[Item], journal: Journal, stages: Stages, workers: Workers, progress: Progress
) -> Iterator[tuple[list[Line], dict[str, float]]]:
    """The lines of samples and rejections as they come, and what each stage took for them."""
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    reading = reading_cpus([node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]])
    count, asked, progress.cpus = workers.resources(ray.cluster_resources())
    progress.encoders = count
    size = max(_BLOCK, -(-len(left) // _BLOCKS))
    size = min(size, max(1, len(left) // max(1, round(2 * progress.cpus))))  # some for each CPU
    tables = []
    for start in range(0, len(left), size):
        some = left[start : start + size]
        columns = {
            "path": [item.path for item in some],
            "name": [item.name for item in some],
            "columns": [json.dumps(dict(item.columns), default=str) for item in some],
            "done": [json.dumps(journal.done(item.path)) for item in some],
        }
        tables.append(pa.table(columns))
    data = (
        ray.data.from_arrow(tables)
        .map_batches(stages.read, batch_size=1, num_cpus=reading)
        .map_batches(
            stages.worker, batch_size=stages.batch, fn_constructor_kwargs=dict(stages.options),
            compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count), **asked,
        )
        .map_batches(stages.write, batch_size=stages.shard, num_cpus=_WRITING_CPUS)
    )  # fmt: skip
    begin = time.perf_counter()
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        progress.seconds = time.perf_counter() - begin
        rows = batch.to_pydict()
        yield [json.loads(line) for line in rows["line"]], {stage: sum(rows[f"{stage}_s"]) for stage in STAGES}


def verify(folder: str, settings: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Read all samples back. The lines of damaged ones are removed, so that another run makes them again.

    Returns:
        How many are whole, and what is wrong with the others.
    """
    import pyarrow as pa
    import ray
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    with journal_of(folder, settings) as journal:
        files: dict[str, list[Line]] = {}
        for line in journal.manifest:
            files.setdefault(line["file"], []).append(line)
        if not files:
            return 0, []
        tables = [
            pa.table({"lines": [json.dumps(lines) for lines in chunk]})
            for chunk in _chunks(list(files.values()), max(_BLOCK, -(-len(files) // _BLOCKS)))
        ]
        data = ray.data.from_arrow(tables).map_batches(partial(_damage, folder=folder), batch_size=_BLOCK)
        wrong: dict[tuple[str, int], str] = {}
        for row in data.iter_rows():
            wrong[row["item"], row["index"]] = row["reason"]
        if wrong:
            journal.drop(lambda line: (line["item"], line["index"]) in wrong)
        return journal.samples, sorted(wrong.values())


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _damage(batch: Mapping[str, Sequence[str]], folder: str) -> dict[str, list[Any]]:
    found = [one for lines in batch["lines"] for one in damage(json.loads(lines), folder)]
    return {
        "item": [line["item"] for line, _ in found],
        "index": [line["index"] for line, _ in found],
        "reason": [reason for _, reason in found],
    }
