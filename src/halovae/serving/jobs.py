"""Jobs in SQLite. They outlive the processes that work on them."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal["video", "image"]
Status = Literal["queued", "in_progress", "completed", "failed"]
ATTEMPTS = 2  # how often a job is started before it fails because its ranks ended


@dataclass(frozen=True)
class JobSpec:
    """What a job asks for, checked and rounded.

    Attributes:
        text: the prompt; `size`, `frames`, `steps`, `seed`, `negative`, `guidance` and `guidance_2` as in `Prompt`.
        images: paths of pictures to start from, written by the front.
        count: how many results to make, one for each seed from `seed` on.
        fps: frames per second of a video.
        preview_every: steps from one preview to the next; None for no previews.
        asked: what was asked for where a value was rounded, by field of the request.
    """

    text: str
    size: tuple[int, int]
    frames: int
    steps: int
    seed: int
    negative: str | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    images: tuple[str, ...] = ()
    count: int = 1
    fps: float = 16.0
    preview_every: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """A job as it is stored. Times are seconds since 1970.

    Attributes:
        seq: its place in the order of arrival.
        attempts: how often ranks have started it.
        report: figures of its decode, as `decoding.summary` returns them.
    """

    id: str
    kind: Kind
    model: str
    spec: JobSpec
    created: float
    seq: int = 0
    status: Status = "queued"
    started: float | None = None
    completed: float | None = None
    attempts: int = 0
    error_code: str | None = None
    error_message: str | None = None
    files: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None

    @classmethod
    def new(cls, kind: Kind, model: str, spec: JobSpec) -> Job:
        return cls(f"{kind}_{uuid.uuid4().hex}", kind, model, spec, time.time())

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    def names(self) -> list[str]:
        """Return the file names of its results."""
        suffix = "mp4" if self.kind == "video" else "png"
        return [f"{self.id}-{index}.{suffix}" for index in range(self.spec.count)]


# Names of results that are being written: a name of `Job.names`, as `media.partial_of` changes it.
_PARTIAL = re.compile(r"\.(video|image)_[0-9a-f]{32}-[0-9]+\.(mp4|png)\.partial")
_JSON = ("spec", "files", "report")
_COLUMNS = tuple(column.name for column in fields(Job) if column.name != "seq")


class Jobs:
    """All jobs of an output directory. For use from one thread."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        columns = ", ".join("id TEXT UNIQUE NOT NULL" if name == "id" else name for name in _COLUMNS)
        self._db.execute(f"CREATE TABLE IF NOT EXISTS jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, {columns})")
        self._db.execute("CREATE INDEX IF NOT EXISTS by_status ON jobs (status, seq)")

    def close(self) -> None:
        self._db.close()

    def wait_for_others(self, seconds: float) -> None:
        """Set how long a call waits for another writing process before it raises sqlite3.OperationalError."""
        self._db.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def add(self, job: Job) -> None:
        """Store a new job. It is on disk when this returns."""
        values = _row(asdict(job))
        marks = ", ".join("?" for _ in _COLUMNS)
        cursor = self._db.execute(
            f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks})", [values[name] for name in _COLUMNS]
        )
        job.seq = int(cursor.lastrowid or 0)

    def get(self, job: str) -> Job | None:
        return next(iter(self._select("WHERE id = ?", job)), None)

    def update(self, job: Job, **changes: Any) -> None:
        """Change a job on disk, then in memory. A change that cannot be written is not made in memory."""
        assigned = ", ".join(f"{name} = ?" for name in changes)
        self._db.execute(f"UPDATE jobs SET {assigned} WHERE id = ?", [*_row(changes).values(), job.id])
        for name, value in changes.items():
            setattr(job, name, value)

    def delete(self, job: str) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def of(self, *statuses: Status, limit: int = -1) -> list[Job]:
        """Return the jobs with one of these statuses, in order of arrival."""
        marks = ", ".join("?" for _ in statuses)
        return self._select(f"WHERE status IN ({marks}) ORDER BY seq LIMIT ?", *statuses, limit)

    def count(self, status: Status) -> int:
        return int(self._db.execute("SELECT count(*) FROM jobs WHERE status = ?", (status,)).fetchone()[0])

    def page(self, kind: Kind | None, limit: int, newest_first: bool = True, after: Job | None = None) -> list[Job]:
        """Return up to `limit` jobs that follow `after`, the newest first or in order of arrival."""
        where, values = ["1"], []
        if kind is not None:
            where.append("kind = ?")
            values.append(kind)
        if after is not None:
            where.append(f"seq {'<' if newest_first else '>'} {after.seq}")
        order = "DESC" if newest_first else "ASC"
        return self._select(f"WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?", *values, limit)

    def _select(self, rest: str, *values: Any) -> list[Job]:
        return [_job(row) for row in self._db.execute(f"SELECT * FROM jobs {rest}", values)]


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(_plain(value)) if name in _JSON else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, JobSpec) else value


def _job(row: sqlite3.Row) -> Job:
    values = {name: json.loads(value) if name in _JSON else value for name, value in dict(row).items()}
    spec = values["spec"]
    values["spec"] = JobSpec(**{**spec, "size": tuple(spec["size"]), "images": tuple(spec["images"])})
    return Job(**values)


def tidy(results: Path) -> None:
    """Remove partial results of ended processes.

    Finished results of unknown jobs stay, as the database may have been lost. Files with other names stay too.
    """
    for path in results.glob(".*.partial"):
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


def adopt(output: Path, results: Path, completed: Iterable[Job]) -> None:
    """Move the results of these jobs from `output` to `results`. An earlier version kept them in `output`."""
    for job in completed:
        for name in job.names():
            if (output / name).is_file() and not (results / name).exists():
                shutil.move(output / name, results / name)
