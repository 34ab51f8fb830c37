"""What becomes of jobs when ranks end or stall, when the server ends, and when its database is lost or damaged."""

import asyncio
import json
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.clients import SMALL, SPEC, Restarts, finished, job_on_disk, runs, shown, submitted, until
from serving.hostile import picture
from serving.stub_ranks import DECODE, Rank, front_settings, locked, rank_settings, served

from halovae.cli import serve
from halovae.pipelines.specs import Prompt
from halovae.serving import channel, events, table
from halovae.serving.broadcast import RankZeroBroadcast
from halovae.serving.channel import RankChannel
from halovae.serving.decoding import Decoding
from halovae.serving.dispatch import Dispatcher
from halovae.serving.files import Attempt, Batch, Writer
from halovae.serving.jobs import TRIES, Job
from halovae.serving.metrics import Metrics
from halovae.serving.outcomes import Outcomes
from halovae.serving.replicas import OneGroup
from halovae.serving.results import noted
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable, OtherVersion, QueueFull, opened

# Interruptions.


def test_a_job_that_ends_the_ranks_each_time_is_given_up(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        video = submitted(url)
        for count in range(TRIES):
            rank = Rank(tmp_path)
            rank.send("started", attempt=rank.receive()["attempt"])
            until(lambda: shown(url, video)["status"] == "in_progress")
            assert job_on_disk(tmp_path, video).interrupted == ({"ranks": count} if count else {})
        Rank(tmp_path)
        failed = finished(url, video)
    assert failed["error"]["code"] == "interrupted"
    assert f"{TRIES} times" in failed["error"]["message"]


def test_a_job_that_runs_beside_one_that_ends_the_ranks_loses_nothing(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        videos = [submitted(url, prompt=text) for text in ("fatal", "innocent")]
        rank = Rank(tmp_path)
        attempts = [rank.receive() for _ in videos]
        for one in attempts:
            rank.send("started", attempt=one["attempt"])
        until(lambda: all(shown(url, video)["status"] == "in_progress" for video in videos))
        for _ in range(TRIES):  # from now on each runs alone, the older one first
            rank = Rank(tmp_path)
            alone = rank.receive()
            assert alone["prompt"]["text"] == "fatal"
            rank.send("started", attempt=alone["attempt"])
            until(lambda: shown(url, videos[0])["status"] == "in_progress")
            assert shown(url, videos[1])["status"] == "queued"
        rank = Rank(tmp_path)
        other = rank.receive()
        assert other["prompt"]["text"] == "innocent"
        rank.send("started", attempt=other["attempt"])
        rank.send("finished", attempt=other["attempt"], decode=DECODE)
        assert [finished(url, video)["status"] for video in videos] == ["failed", "completed"]
        assert job_on_disk(tmp_path, videos[1]).interrupted == {}


def test_ranks_that_fall_silent_are_restarted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.serving.replicas.SILENCE", 0.5)
    restarts = Restarts()
    with served(model, tmp_path, stub=False, restart=restarts, stall_timeout=0.5):
        Rank(tmp_path)
        until(lambda: bool(restarts.reasons))


def test_ranks_that_do_not_let_go_of_a_cancelled_job_are_restarted(model: Path, tmp_path: Path) -> None:
    restarts = Restarts()
    with served(model, tmp_path, stub=False, restart=restarts, stall_timeout=1.0) as (url, _):
        rank = Rank(tmp_path)
        video = submitted(url)
        rank.send("started", attempt=rank.receive()["attempt"])
        until(partial(runs, url, video))
        httpx.post(f"{url}/v1/videos/{video}/cancel").raise_for_status()
        while not restarts.reasons:
            rank.send("beat", ready=True, token=rank.token, since=0.0)
            time.sleep(0.1)


def test_files_that_cannot_be_removed_keep_no_new_ranks_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        cancelled = submitted(url)
        rank.start()
        until(partial(runs, url, cancelled))
        httpx.post(f"{url}/v1/videos/{cancelled}/cancel").raise_for_status()
        monkeypatch.setattr("halovae.serving.results.remove", stuck)
        rank = Rank(tmp_path, patience=10)
        video = submitted(url)
        rank.send("finished", attempt=rank.start(), decode=DECODE)
        assert finished(url, video)["status"] == "completed"


@pytest.mark.anyio
async def test_ranks_that_are_lost_twice_at_once_end_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the dispatcher hears new ranks while their supervisor says that the earlier ones have ended."""

    async def render(job: str) -> bytes:
        return job.encode()

    removed, ranks, fleet = list[str](), rank_settings(model, tmp_path), OneGroup(tmp_path, lambda *_: False)
    monkeypatch.setattr("halovae.serving.results.remove", lambda folder, job, partial: removed.append(job.id))
    jobs = JobStore(tmp_path / "jobs.sqlite")
    dispatcher = Dispatcher(jobs, ranks, front_settings(model), Metrics(), fleet, render)
    replica = fleet.replicas["0"]
    replica.removed = {str(number): Job.new("video", "tiny", SPEC) for number in range(3)}
    expected = sorted(job.id for job in replica.removed.values())
    await asyncio.gather(dispatcher.lose(replica), dispatcher.lose(replica))
    assert sorted(removed) == expected
    assert not replica.removed
    jobs.close()


def test_what_ranks_say_while_they_are_ended_does_not_count(model: Path, tmp_path: Path) -> None:
    """Else the next ones would have to be as quick as ranks that are ready, and would be ended while they load."""
    restarts = Restarts()
    with served(model, tmp_path, stub=False, restart=restarts, stall_timeout=1.0) as (url, _):
        rank = Rank(tmp_path)
        video = submitted(url)
        attempt = rank.start()
        until(lambda: bool(restarts.reasons))
        rank.send("beat", ready=True, token=rank.token, since=0.0)
        rank.send("finished", attempt=attempt, decode=DECODE)
        time.sleep(2.5)
        assert len(restarts.reasons) == 1
        assert httpx.get(f"{url}/readyz").status_code == 503
        rank = Rank(tmp_path)
        until(lambda: job_on_disk(tmp_path, video).interrupted == {"stall": 1})
        rank.send("finished", attempt=rank.start(), decode=DECODE)
        assert finished(url, video)["status"] == "completed"


def test_ranks_that_are_starting_are_not_restarted(model: Path, tmp_path: Path) -> None:
    restarts = Restarts(could=False)
    with served(model, tmp_path, stub=False, restart=restarts, stall_timeout=0.5) as (url, _):
        rank = Rank(tmp_path)
        video = submitted(url)
        rank.send("started", attempt=rank.receive()["attempt"])
        until(lambda: len(restarts.reasons) > 1)
        rank = Rank(tmp_path)
        rank.receive()
        until(lambda: shown(url, video)["status"] == "queued")
        assert job_on_disk(tmp_path, video).interrupted == {"ranks": 1}  # they had ended by themselves


def test_a_job_that_ends_the_ranks_before_they_say_so_is_given_up(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        video = submitted(url)
        for _ in range(TRIES):
            Rank(tmp_path).receive()
        Rank(tmp_path)
        assert finished(url, video)["error"]["code"] == "interrupted"


def test_a_job_that_runs_too_long_fails_and_the_next_one_starts(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, job_seconds=0.5) as (url, stub):
        assert stub is not None
        stub.held.set()
        slow, other = submitted(url), submitted(url)
        until(partial(runs, url, slow))
        failed = finished(url, slow)
        stub.held.clear()
        assert (failed["status"], failed["error"]["code"]) == ("failed", "timeout")
        assert "--job-timeout" in failed["error"]["message"]
        assert finished(url, other)["status"] == "completed"


def test_a_cancelled_job_stays_and_its_ranks_stop(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (url, stub):
        assert stub is not None
        stub.held.set()
        running, waiting = submitted(url), submitted(url)
        until(lambda: shown(url, running)["status"] == "in_progress")
        for video in (waiting, running):
            answer = httpx.post(f"{url}/v1/videos/{video}/cancel").json()
            assert (answer["status"], answer["error"]["code"]) == ("failed", "cancelled")
        until(lambda: not stub.channel._known)
        stub.held.clear()
        done = finished(url, submitted(url))["id"]
        again = httpx.post(f"{url}/v1/videos/{done}/cancel").json()
        assert (again["status"], again["error"]) == ("completed", None)  # it had ended before
        assert [one["id"] for one in httpx.get(f"{url}/v1/videos").json()["data"]] == [done, waiting, running]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "mine"}])
def test_pictures_that_nobody_waits_for_are_not_made_after_a_restart(
    headers: dict[str, str], model: Path, tmp_path: Path
) -> None:
    """A client that sent a key of its own can come back, and gets the job that it made."""
    jobs = opened(tmp_path / "jobs.sqlite")
    job = jobs.add(replace(Job.new("image", "tiny", SPEC), request=headers.get("Idempotency-Key"), digest="d"))
    jobs.close()
    with served(model, tmp_path, stub=False):
        pass
    jobs = JobTable(tmp_path / "jobs.sqlite")
    assert [one.id for one in jobs.of("queued")] == ([job.id] if headers else [])
    jobs.close()


def test_a_job_that_is_cancelled_while_it_starts_stays_cancelled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, storing = Outcomes._store, threading.Event()

    async def slow(self: Outcomes, job: Job, changes: dict[str, Any]) -> None:
        storing.set()
        await asyncio.sleep(0.5)
        await store(self, job, changes)

    monkeypatch.setattr(Outcomes, "_store", slow)
    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        video = submitted(url)
        rank.send("started", attempt=rank.receive()["attempt"])
        assert storing.wait(20)
        answer = httpx.post(f"{url}/v1/videos/{video}/cancel", timeout=30).json()
        assert (answer["status"], answer["error"]["code"]) == ("failed", "cancelled")
        assert rank.receive()["kind"] == "cancel"
        assert job_on_disk(tmp_path, video).status == "failed"


def test_a_batch_whose_attempts_are_all_cancelled_is_not_decoded_to_its_end(tmp_path: Path) -> None:
    attempts = [Attempt(name, Prompt("a"), (tmp_path / f"{name}.png",), 16.0) for name in "ab"]
    batch = Batch(attempts)
    channel = RankChannel(tmp_path)
    decoding = Decoding(None, {}, 4, RankZeroBroadcast(), channel)  # type: ignore[arg-type]
    writer = Writer(channel)
    channel._known |= {"a", "b"}
    for name in "ab":
        assert decoding._is_wanted(batch)
        channel.cancelled.add(name)
        writer._run_step(batch, attempts["ab".index(name)], writer._append, None)  # tells the front, once
    assert not decoding._is_wanted(batch)


# The server's end.


def test_a_server_that_ends_lets_a_running_job_end(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, drain=20.0) as (url, stub):
        assert stub is not None
        stub.held.set()
        running, waiting = submitted(url), submitted(url)
        until(lambda: shown(url, running)["status"] == "in_progress")
        threading.Timer(1.0, stub.held.clear).start()
    assert job_on_disk(tmp_path, running).status == "completed"
    kept = job_on_disk(tmp_path, waiting)
    assert (kept.status, kept.interrupted) == ("queued", {})


@pytest.mark.parametrize("planned", [False, True])
def test_a_server_that_was_killed_while_it_ended_counts_against_no_job(
    planned: bool, model: Path, tmp_path: Path
) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    job = jobs.add(Job.new("video", "tiny", SPEC))
    jobs.update(job, status="in_progress")
    jobs.close()
    if planned:
        (tmp_path / ".ending").touch()
    with served(model, tmp_path, stub=False):
        kept = job_on_disk(tmp_path, job.id)
        assert (kept.status, kept.interrupted) == ("queued", {} if planned else {"front": 1})
        assert not (tmp_path / ".ending").exists()


def test_a_server_that_is_ending_takes_no_new_job(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, drain=20.0) as (url, stub):
        assert stub is not None
        stub.held.set()
        running = submitted(url)
        until(lambda: shown(url, running)["status"] == "in_progress")
        stub.end_server()
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ending")
        assert refused.headers["retry-after"].isdigit()
        assert shown(url, running)["status"] == "in_progress"  # the server still answers
        stub.held.clear()


# The database.


def test_a_start_waits_for_another_process_that_writes(tmp_path: Path) -> None:
    opened(tmp_path / "jobs.sqlite").close()
    later = sqlite3.connect(tmp_path / "jobs.sqlite")
    later.execute("PRAGMA user_version = 0")  # so that there is something to write
    later.close()
    held = threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            time.sleep(1)

    threading.Thread(target=hold).start()
    assert held.wait(20)
    jobs = opened(tmp_path / "jobs.sqlite")
    assert jobs._db.execute("PRAGMA user_version").fetchone()[0] == table.VERSION
    jobs.close()


def test_a_start_with_nothing_to_write_does_not_wait(tmp_path: Path) -> None:
    opened(tmp_path / "jobs.sqlite").close()
    with locked(tmp_path):
        opened(tmp_path / "jobs.sqlite").close()


def test_a_deleted_job_does_not_come_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files cannot be removed, and the database is lost."""
    with served(model, tmp_path) as (url, _):
        video = finished(url, submitted(url))["id"]

        def stuck(results: Path, job: Job) -> None:
            raise PermissionError(results)

        monkeypatch.setattr("halovae.serving.results.remove", stuck)
        httpx.delete(f"{url}/v1/videos/{video}")
    monkeypatch.undo()
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    with served(model, tmp_path, stub=False) as (url, _):
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_a_page_of_noise_within_the_database_is_noticed(tmp_path: Path) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    for _ in range(200):
        jobs.add(Job.new("video", "tiny", replace(SPEC, text="x" * 500)))
    jobs.close()
    path = tmp_path / "jobs.sqlite"
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(range(256)) * 16
    path.write_bytes(content)
    jobs = opened(path)
    assert jobs.count("queued") == 0
    jobs.close()
    assert list(tmp_path.glob("jobs.sqlite.damaged-*"))


def test_the_database_of_a_later_version_is_refused_and_kept(model: Path, tmp_path: Path) -> None:
    opened(tmp_path / "jobs.sqlite").close()
    later = sqlite3.connect(tmp_path / "jobs.sqlite")
    later.execute(f"PRAGMA user_version = {table.VERSION + 1}")
    later.close()
    with pytest.raises(OtherVersion, match=f"version {table.VERSION + 1}.*upgrade halovae"):
        serve._run_front(rank_settings(model, tmp_path), front_settings(model), None)
    assert not list(tmp_path.glob("*.damaged-*"))


def test_an_earlier_database_gets_the_new_columns(tmp_path: Path) -> None:
    earlier = sqlite3.connect(tmp_path / "jobs.sqlite")
    old = "id TEXT UNIQUE NOT NULL, kind, model, spec, created, status, started, completed, attempts, error_code"
    earlier.execute(f"CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, {old}, error_message, files, report)")
    spec = {"text": "a", "size": [64, 48], "frames": 5, "steps": 2, "seed": 0, "images": []}
    row = "video_1", "video", "tiny", json.dumps(spec), 5.0, "queued", 0, "[]", "null"
    earlier.execute("INSERT INTO jobs (id, kind, model, spec, created, status, attempts, files, report) VALUES "
                    "(?, ?, ?, ?, ?, ?, ?, ?, ?)", row)  # fmt: skip
    earlier.commit()
    earlier.close()
    for _ in range(2):
        jobs = opened(tmp_path / "jobs.sqlite")
        assert jobs.of("queued") == [Job("video_1", "video", "tiny", SPEC, 5.0, seq=1)]
        jobs.close()


def test_a_row_that_cannot_be_read_costs_no_other_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    made = [jobs.add(Job.new("video", "tiny", SPEC)) for _ in range(3)]
    jobs._db.execute("UPDATE jobs SET spec = '{' WHERE id = ?", (made[0].id,))
    later = json.dumps({"text": "b", "size": [64, 48], "frames": 5, "steps": 2, "seed": 0, "images": [], "mood": "sad"})
    jobs._db.execute("UPDATE jobs SET spec = ? WHERE id = ?", (later, made[1].id))
    jobs.close()
    jobs = opened(tmp_path / "jobs.sqlite")
    assert [(job.id, job.spec.text) for job in jobs.of("queued")] == [(made[1].id, "b"), (made[2].id, "a")]
    assert [job.id for job in jobs.page(None, 9, newest_first=False)] == [made[1].id, made[2].id]
    jobs.close()
    assert [made[0].id in record.getMessage() for record in caplog.records] == [True]
    assert jobs_of_no_use(tmp_path, made[0]) == (None, made[0].id)


def jobs_of_no_use(output: Path, job: Job) -> tuple[Job | None, str]:
    """Ask for a job that cannot be read, take it over from its note, and return what was found before and after."""
    jobs = opened(output / "jobs.sqlite")
    before = jobs.get(job.id)
    assert job.id in jobs.unended()
    assert jobs.adopt([replace(job, status="completed")]) == 1
    after = jobs.get(job.id)
    assert after is not None
    jobs.close()
    return before, after.id


def test_results_are_taken_over_only_with_their_notes_and_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    jobs = [Job.new("video", "tiny", SPEC) for _ in range(6)]
    for job in jobs:
        (results / job.names()[0]).write_bytes(b"a video")
        (results / f"{job.id}.json").write_text(table.as_json(replace(job, status="completed", files=job.names())))
    (results / jobs[1].names()[0]).unlink()
    (results / f"{jobs[2].id}.json").write_text('{"id": 5}')
    (results / f"{jobs[3].id}.json").unlink()
    (results / f"{jobs[4].id}.json").write_text(table.as_json(replace(jobs[5], status="completed")))
    count = table.as_json(replace(jobs[5], status="completed")).replace('"count": 1', '"count": "1"')
    (results / f"{jobs[5].id}.json").write_text(count)
    (results / "theirs.json").write_text("{}")
    assert [job.id for job in noted(results)] == [jobs[0].id]


def test_a_job_that_completed_after_the_copy_of_the_database_is_not_made_again(model: Path, tmp_path: Path) -> None:
    """An older copy of the database comes back."""
    with served(model, tmp_path, stub=False) as (url, _):
        video = submitted(url)
    copy = tmp_path / "copy.sqlite"
    shutil.copy(tmp_path / "jobs.sqlite", copy)
    with served(model, tmp_path) as (url, _):
        before = finished(url, video)
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    copy.rename(tmp_path / "jobs.sqlite")
    with served(model, tmp_path) as (url, stub):
        assert shown(url, video)["completed_at"] == before["completed_at"]
        assert stub is not None
        assert stub.seen == []


@pytest.mark.anyio
async def test_a_lock_by_another_process_stops_neither_reads_nor_the_event_loop(tmp_path: Path) -> None:
    jobs = JobStore(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", SPEC)
    await jobs.write(JobTable.add, job)
    with locked(tmp_path):
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await jobs.write(JobTable.update, job, status="failed")
        assert await jobs.read(JobTable.get, job.id) == job
        assert job.status == "queued"
    await jobs.write(JobTable.update, job, status="failed")
    assert (await jobs.read(JobTable.count, "failed")) == 1
    jobs.close()


# Requests that come twice, and queues of one key.


def test_a_request_that_is_repeated_makes_one_job(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (url, stub):
        headers, body = {"Idempotency-Key": "first"}, {"prompt": "a", **SMALL}
        ids = {httpx.post(f"{url}/v1/videos", json=body, headers=headers).json()["id"] for _ in range(3)}
        assert len(ids) == 1
        other = httpx.post(f"{url}/v1/videos", json={**body, "prompt": "b"}, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_conflict")
        assert httpx.post(f"{url}/v1/videos", json=body).json()["id"] not in ids
        assert httpx.post(f"{url}/v1/videos", json=body, headers={"Idempotency-Key": "x" * 300}).status_code == 400
        assert finished(url, ids.pop())["status"] == "completed"
        assert stub is not None


def test_a_client_that_left_comes_back_for_its_pictures(editor: Path, tmp_path: Path) -> None:
    """Its library gives up waiting, and sends the same request again."""
    body = {
        "data": {"prompt": "a", "size": "64x48"},
        "files": {"image": picture()},
        "headers": {"Idempotency-Key": "1"},
    }
    with served(editor, tmp_path) as (url, stub):
        assert stub is not None
        stub.held.set()
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/images/edits", timeout=1.0, **body)  # type: ignore[arg-type]
        threading.Timer(0.7, stub.held.clear).start()
        answer = httpx.post(f"{url}/v1/images/edits", timeout=30, **body)  # type: ignore[arg-type]
        assert (answer.status_code, len(stub.seen)) == (200, 1)


def test_a_queue_of_one_key_is_full_on_its_own(tmp_path: Path) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    for owner in ("a", "b"):
        for _ in range(2):
            jobs.add(Job.new("video", "tiny", SPEC, owner), most=10, most_of_owner=2)
        with pytest.raises(QueueFull) as full:
            jobs.add(Job.new("video", "tiny", SPEC, owner), most=10, most_of_owner=2)
        assert full.value.of_owner
    with pytest.raises(QueueFull) as full:
        jobs.add(Job.new("video", "tiny", SPEC, "c"), most=4, most_of_owner=2)
    assert not full.value.of_owner
    assert [len(jobs.page(None, 9, owner=owner)) for owner in ("a", "c", None)] == [2, 0, 0]
    jobs.close()


# Events, sweeps, and the ranks' socket.


def test_a_sweep_removes_what_is_too_old_and_what_is_too_much(tmp_path: Path) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    made = [Job.new("video", "tiny", SPEC) for _ in range(5)]
    for index, job in enumerate(made):
        jobs.add(job)
        jobs.update(job, status="completed", completed=100.0 + index, bytes=10)
    jobs.add(Job.new("video", "tiny", SPEC))  # it waits: its age does not count

    def expired(before: float, most: int | None, limit: int = 9) -> list[int]:
        return [made.index(job) for job in jobs.expired(before, most, limit)]

    assert expired(102.0, None) == [0, 1]
    assert expired(0.0, 25) == [0, 1, 2]
    assert expired(104.0, 45) == [0, 1, 2, 3]
    assert expired(104.0, 45, limit=2) == [0, 1]
    assert expired(0.0, None) == []
    jobs.close()


def test_a_listener_that_does_not_read_is_dropped_and_too_many_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST", 2)
    with served(model, tmp_path, stub=False) as (url, _):
        with httpx.stream("GET", f"{url}/v1/jobs"), httpx.stream("GET", f"{url}/v1/jobs"):
            refused = httpx.get(f"{url}/v1/jobs")
            assert (refused.status_code, refused.headers["retry-after"].isdigit()) == (429, True)
        until(lambda: httpx.stream("GET", f"{url}/v1/jobs").__enter__().status_code == 200)


async def _all(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [event async for event in stream]


@pytest.mark.anyio
async def test_a_slow_listener_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def render(job: str) -> bytes:
        return job.encode()

    monkeypatch.setattr(events, "_PERIOD", 0.0)
    hub = events.Events(render)
    running = asyncio.create_task(hub.run())
    with hub.listening(None) as stream, hub.listening(None) as other:
        for _ in range(events._WAITING + 1):
            hub.publish(Job.new("video", "tiny", SPEC))
            await asyncio.sleep(0)
        assert not hub._listeners
        assert len(await asyncio.wait_for(_all(stream), 10)) <= events._WAITING  # and the stream ends
        await asyncio.wait_for(_all(other), 10)
    running.cancel()


def test_only_this_user_may_enter_the_folder_of_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = channel.SocketFolder(tmp_path / "out", front=True)
    entered = Path(folder.endpoint.removeprefix("ipc://")).parent
    assert [stat.S_IMODE(one.stat().st_mode) for one in (entered, entered.parent)] == [0o700, 0o700]
    assert folder.knows(channel.SocketFolder(tmp_path / "out").current_token())
    assert not folder.knows("")
    assert not folder.knows(None)
    folder.remove()
    assert not entered.exists()
    entered.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="others may enter it"):
        channel.SocketFolder(tmp_path / "out", front=True)


def test_a_front_leaves_no_socket(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path):
        entered = Path(channel.SocketFolder(tmp_path).endpoint.removeprefix("ipc://")).parent
        assert {one.name for one in entered.iterdir()} == {"socket", "token"}
    assert not entered.exists()
