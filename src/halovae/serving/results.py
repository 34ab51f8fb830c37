"""The files of jobs: results, notes beside them from which a lost database is filled again, and input pictures."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from halovae.io.media import discard, partial_of
from halovae.serving.jobs import Job
from halovae.serving.table import as_json, from_json

log = logging.getLogger(__name__)
_ID = "(video|image)_[0-9a-f]{32}"
# Names of results that are being written: a name of `Job.names`, as `media.partial_of` changes it.
_PARTIAL = re.compile(rf"\.{_ID}-[0-9]+\.(mp4|png)\.partial|\.{_ID}\.json\.partial")
_RESULT = re.compile(rf"{_ID}-[0-9]+\.(mp4|png)|{_PARTIAL.pattern}")
_MARKER = ".halovae"
_NOTE = re.compile(rf"{_ID}\.json")
_INPUT = re.compile(rf"({_ID})-[0-9]+\.png")


def prepare(results: Path) -> None:
    """Make the folder of results, and mark it as halovae's. Remove partial results of ended processes.

    Finished results of unknown jobs stay, as the database may have been lost. Files with other names stay too, and
    everything stays in a folder that another program made.
    """
    results.mkdir(mode=0o700, exist_ok=True)
    marker = results / _MARKER
    ours = marker.exists() or any(_RESULT.fullmatch(path.name) for path in results.iterdir())
    marker.write_text("`halovae serve` keeps results here, and removes them when they expire.\n")
    for path in results.glob(".*.partial") if ours else ():
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


def adopt(output: Path, results: Path, completed: Iterable[Job]) -> None:
    """Move the results of these jobs from `output` to `results`. An earlier version kept them in `output`."""
    for job in completed:
        for name in job.names():
            if (output / name).is_file() and not (results / name).exists():
                shutil.move(output / name, results / name)


def note(results: Path, job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    """Write a completed job beside its results. Return the changes that complete it, with the size of its files."""
    sizes = [path.stat().st_size for name in changes["files"] if (path := results / name).is_file()]
    changes = {**changes, "bytes": sum(sizes)}
    path = results / f"{job.id}.json"
    partial = partial_of(path)
    try:
        partial.write_text(as_json(replace(job, **changes)))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return changes


def noted(results: Path) -> Iterator[Job]:
    """Yield the jobs that have a note and all of their results."""
    for path in sorted(results.glob("*.json")):
        if not _NOTE.fullmatch(path.name):
            continue
        try:
            job = from_json(path.read_text())
            if job.id != path.stem or job.status != "completed":
                raise ValueError(f"it is of {job.id}, {job.status}")
            whole = all((results / name).is_file() for name in job.names())
        except Exception as error:  # whatever the file may hold
            log.warning("%s cannot be read: its job is not taken over (%r)", path, error)
            continue
        if whole:
            yield replace(job, spec=replace(job.spec, images=()))


def receive(path: Path, data: bytes, first: bool, last: bool) -> None:
    """Write the next piece of a result that was made on another host. The last one gives the file its name.

    A file of which a piece cannot be written is removed.

    Raises:
        OSError: it cannot be written.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb" if first else "ab") as file:
            file.write(data)
        if last:
            partial.replace(path)
    except OSError:
        discard(partial)
        raise


def forget(results: Path, job: Job) -> None:
    """Remove a job's note, so that the job is not taken over once the database does not know it."""
    (results / f"{job.id}.json").unlink(missing_ok=True)


def remove(results: Path, job: Job, partial: bool = False) -> None:
    """Remove a job's note, its results, and its input pictures; with `partial`, also results that are not whole."""
    forget(results, job)
    drop_inputs(job)
    for name in job.names():
        discard(results / name)
    if partial:
        drop_partial(results, job)


def drop_partial(results: Path, job: Job) -> None:
    """Remove what is there of a job's results that are not whole.

    Raises:
        OSError: it cannot be removed.
    """
    for name in job.names():
        discard(partial_of(results / name))


def try_to_remove(results: Path, job: Job, partial: bool = False) -> None:
    """Remove a job's files as `remove` does; if that fails, the log says so."""
    try:
        remove(results, job, partial)
    except OSError:
        log.exception("the files of %s could not be removed", job.id)


def inputs(job: Job) -> list[bytes]:
    """Return a job's input pictures.

    Raises:
        OSError: one cannot be read.
    """
    return [Path(path).read_bytes() for path in job.spec.images]


def drop_inputs(job: Job) -> None:
    """Remove a job's input pictures."""
    for path in job.spec.images:
        Path(path).unlink(missing_ok=True)


def drop_orphans(inputs: Path, waiting: set[str]) -> None:
    """Remove input pictures of jobs whose ids are not among those of waiting ones."""
    for path in inputs.glob("*.png"):
        match = _INPUT.fullmatch(path.name)
        if match and match[1] not in waiting:
            path.unlink()
