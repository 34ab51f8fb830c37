"""The table of jobs in SQLite: queries, versions, and damaged files."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from halovae.serving.jobs import Job, JobEvent, JobSpec, Kind, Status

log = logging.getLogger(__name__)
VERSION = 2  # of the columns below, kept in SQLite's `user_version`
_BUSY = 0.25  # seconds for which a call waits for another process that writes
_PATIENCE = 60.0  # seconds for which a start waits for it
_PAUSE = 0.5
_JSON = ("spec", "files", "report", "interrupted")
_COLUMNS = tuple(column.name for column in fields(Job) if column.name != "seq")
_SPEC = {one.name for one in fields(JobSpec)}
_ENDED: tuple[Status, ...] = ("completed", "failed")
_EVENTS = "CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, job, type, created, tries, next_try)"
# A trigger of one connection. Its event is written in the transaction that ends the job.
_KEEP_EVENTS = """
    CREATE TEMP TRIGGER keep_events AFTER UPDATE OF status ON main.jobs
    WHEN NEW.status IN ('completed', 'failed') AND OLD.status NOT IN ('completed', 'failed')
    BEGIN
        INSERT INTO events VALUES (
            'evt_' || lower(hex(randomblob(16))), NEW.id, NEW.kind || '.' || NEW.status,
            CAST(strftime('%s', 'now') AS INTEGER), 0, 0
        );
    END
"""


class QueueFull(Exception):
    """The queue holds as many jobs as it may. `of_owner`: the jobs of one key do."""

    def __init__(self, most: int, of_owner: bool = False) -> None:
        super().__init__(most, of_owner)
        self.most, self.of_owner = most, of_owner


class OtherVersion(ValueError):
    """The database was written by a later version of halovae."""


class JobTable:
    """One connection to the table. For use from one thread."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY)
        self._db.row_factory = sqlite3.Row
        (mode,) = self._db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            log.warning("%s: SQLite uses the journal mode %s here, so that reads wait for writes", path, mode)
        self._db.execute("PRAGMA secure_delete=ON")  # deleted prompts do not stay in the file

    def close(self) -> None:
        self._db.close()

    def prepare(self) -> None:
        """Check the file, and make or migrate the table.

        Raises:
            OtherVersion: the file is of a later version.
            sqlite3.DatabaseError: the file is damaged.
        """
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise OtherVersion(
                f"the database is of version {version}, written by a later halovae; this one reads up to {VERSION}: "
                "upgrade halovae, or move jobs.sqlite away"
            )
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        if version < VERSION:
            self._migrate()
        for row in self._db.execute("SELECT * FROM jobs").fetchall():
            problem = None
            try:
                _job(row)
            except Exception as error:  # whatever a row may hold
                problem = repr(error)
                log.error("job %s cannot be read and is left out (%s)", ascii(row["id"]), problem)
            if (problem is None) != (row["problem"] is None):
                self._db.execute("UPDATE jobs SET problem = ? WHERE seq = ?", (problem, row["seq"]))

    def _migrate(self) -> None:
        """Make the tables, or add the columns that version 0 lacks, and the table of events that version 1 lacks."""
        self._db.execute("BEGIN IMMEDIATE")
        columns = ", ".join("id TEXT UNIQUE NOT NULL" if name == "id" else name for name in _COLUMNS)
        self._db.execute(f"CREATE TABLE IF NOT EXISTS jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, {columns})")
        present = {row["name"] for row in self._db.execute("PRAGMA table_info(jobs)")}
        # Why a row cannot be read. Its other columns stay: a later version may be able to read it.
        for name in (one for one in (*_COLUMNS, "problem") if one not in present):
            self._db.execute(f"ALTER TABLE jobs ADD COLUMN {name}")
        self._db.execute("CREATE INDEX IF NOT EXISTS by_status ON jobs (status, seq)")
        self._db.execute("CREATE UNIQUE INDEX IF NOT EXISTS by_request ON jobs (ifnull(owner, ''), request)")
        self._db.execute(_EVENTS)
        self._db.execute(f"PRAGMA user_version={VERSION}")
        self._db.execute("COMMIT")

    def add(self, job: Job, most: int | None = None, most_of_owner: int | None = None) -> Job:
        """Store a new job, and return it. It is on disk when this returns.

        A job of the same owner and idempotency key is returned instead, if there is one.

        Raises:
            QueueFull: `most` jobs are waiting, or `most_of_owner` of this job's owner.
        """
        if job.request is not None:
            for known in self._select("ifnull(owner, '') = ifnull(?, '') AND request = ?", job.owner, job.request):
                return known
        if most is not None and self.count("queued") >= most:
            raise QueueFull(most)
        if most_of_owner is not None and self.count("queued", job.owner) >= most_of_owner:
            raise QueueFull(most_of_owner, of_owner=True)
        values = _row(asdict(job))
        marks = ", ".join("?" for _ in _COLUMNS)
        cursor = self._db.execute(
            f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks})", [values[name] for name in _COLUMNS]
        )
        job.seq = int(cursor.lastrowid or 0)
        return job

    def get(self, job: str) -> Job | None:
        return next(iter(self._select("id = ?", job)), None)

    def update(self, job: Job, /, **changes: Any) -> None:
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
        return self._select(f"status IN ({marks}) ORDER BY seq LIMIT ?", *statuses, limit)

    def unended(self) -> set[str]:
        """Return the ids of all jobs that have not ended, also of those that cannot be read."""
        return {row["id"] for row in self._db.execute("SELECT id FROM jobs WHERE status NOT IN (?, ?)", _ENDED)}

    def expired(self, before: float, most_bytes: int | None, limit: int) -> list[Job]:
        """Return up to `limit` jobs to remove, the oldest first.

        These are jobs that ended before a time, and those beyond the newest ones whose files take `most_bytes`.
        """
        sizes = "SELECT seq, sum(bytes) OVER (ORDER BY seq DESC) AS total FROM jobs WHERE status IN (?, ?)"
        return self._select(
            f"status IN (?, ?) AND (ifnull(completed, created) < ? OR (? IS NOT NULL AND "
            f"seq IN (SELECT seq FROM ({sizes}) WHERE total > ?))) ORDER BY seq LIMIT ?",
            *_ENDED, before, most_bytes, *_ENDED, most_bytes, limit,
        )  # fmt: skip

    def count(self, status: Status, owner: str | None = None) -> int:
        """Return the number of jobs with a status, or of those that belong to an owner."""
        query = "SELECT count(*) FROM jobs WHERE status = ? AND problem IS NULL AND (? IS NULL OR owner = ?)"
        return int(self._db.execute(query, (status, owner, owner)).fetchone()[0])

    def page(
        self, kind: Kind | None, limit: int, newest_first: bool = True, after: Job | None = None,
        owner: str | None = None,
    ) -> list[Job]:  # fmt: skip
        """Return up to `limit` of an owner's jobs that follow `after`, the newest first or in order of arrival."""
        where, values = ["owner IS ?"], [owner]
        if kind is not None:
            where.append("kind = ?")
            values.append(kind)
        if after is not None:
            where.append(f"seq {'<' if newest_first else '>'} {after.seq}")
        order = "DESC" if newest_first else "ASC"
        return self._select(f"{' AND '.join(where)} ORDER BY seq {order} LIMIT ?", *values, limit)

    def adopt(self, found: Iterable[Job]) -> int:
        """Store completed jobs whose results were found. Return how many the table did not hold as ended."""
        adopted = 0
        for job in found:
            known = self.get(job.id)
            if known is not None and known.ended:
                continue
            adopted += 1
            if known is None:
                self.delete(job.id)  # a row that cannot be read
                self.add(replace(job, seq=0, request=None))
            else:
                self.update(
                    known, status="completed", completed=job.completed, files=job.files, bytes=job.bytes,
                    report=job.report,
                )  # fmt: skip
        return adopted

    def keep_events(self) -> None:
        """From now on, keep an event for each job that completes or fails by a change over this connection."""
        self._db.execute("PRAGMA temp_store=MEMORY")
        self._db.execute(_KEEP_EVENTS)

    def due_events(self, now: float, limit: int) -> list[JobEvent]:
        """Return up to `limit` events that are to be sent by now."""
        columns = ", ".join(column.name for column in fields(JobEvent))
        query = f"SELECT {columns} FROM events WHERE next_try <= ? ORDER BY next_try, created, rowid LIMIT ?"
        return [JobEvent(*row) for row in self._db.execute(query, (now, limit))]

    def next_event(self) -> float | None:
        """Return when the next event is to be sent, in seconds since 1970; None if there is none."""
        (time_of_next,) = self._db.execute("SELECT min(next_try) FROM events").fetchone()
        return None if time_of_next is None else float(time_of_next)

    def put_off(self, event: str, until: float) -> None:
        """Note that an event was sent in vain, and when it is sent again."""
        self._db.execute("UPDATE events SET tries = tries + 1, next_try = ? WHERE id = ?", (until, event))

    def drop_event(self, event: str) -> None:
        self._db.execute("DELETE FROM events WHERE id = ?", (event,))

    def trim(self) -> None:
        """Empty the log of writes, which may hold what was deleted."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _select(self, condition: str, *values: Any) -> list[Job]:
        rows = self._db.execute(f"SELECT * FROM jobs WHERE problem IS NULL AND {condition}", values)
        return [_job(row) for row in rows]


def opened(path: Path) -> JobTable:
    """Open the table. A damaged file is moved aside, and a new one made.

    Raises:
        OtherVersion: the file is of a later version.
        sqlite3.OperationalError: the file cannot be opened or written, for a minute.
    """
    table, waiting, deadline = None, False, time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                table = JobTable(path)
                table.prepare()
                return table
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                if not waiting:
                    log.warning("%s cannot be written (%s): the start waits for it", path, error)
                waiting = True
                if table is not None:
                    table.close()
                time.sleep(_PAUSE)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        if table is not None:
            table.close()
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            if (old := path.with_name(path.name + suffix)).exists():
                old.rename(aside.with_name(aside.name + suffix))
        log.error("%s is damaged (%s): it was moved to %s, and waiting jobs are lost", path, error, aside.name)
        table = JobTable(path)
        table.prepare()
    return table


def as_json(job: Job) -> str:
    """Return a job as JSON."""
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    """Return the job that `as_json` wrote.

    Raises:
        ValueError, TypeError, KeyError: it did not write this.
    """
    return _restored(json.loads(text))


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(_plain(value)) if name in _JSON else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, JobSpec) else value


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    return _restored(
        {name: json.loads(value) if name in _JSON and value is not None else value for name, value in values.items()}
    )


def _restored(values: dict[str, Any]) -> Job:
    spec = {name: value for name, value in values["spec"].items() if name in _SPEC}
    values["spec"] = JobSpec(**{**spec, "size": tuple(spec["size"]), "images": tuple(spec["images"])})
    values["alone"] = bool(values["alone"])
    defaults: dict[str, Any] = {"interrupted": {}, "files": [], "bytes": 0, "attempts": 0}  # of columns that were added
    for name, value in defaults.items():
        values[name] = value if values[name] is None else values[name]
    return Job(**{name: values[name] for name in ("seq", *_COLUMNS)})
