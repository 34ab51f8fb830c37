"""What a server keeps: the files of other programs, its results, and the end of each job."""

import asyncio
import base64
import http.client
import io
import json
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import zmq
from PIL import Image
from serving.clients import ID, SMALL, finished, submitted
from serving.stub_ranks import DECODE, Rank, front_settings, locked, rank_settings, served

from halovae.cli import serve
from halovae.io import media
from halovae.pipelines import tiny
from halovae.serving.dispatch import Dispatcher
from halovae.serving.jobs import Job, JobSpec
from halovae.serving.table import JobTable, opened


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan2.1", "wan2.1-i2v", "qwen-image"):
        tiny.make_model(name, folder / name)
    return folder


def test_a_start_removes_partial_results(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "results" / f".video_{ID}-0.mp4.partial"
    partial.parent.mkdir()
    partial.touch()
    with served(model, tmp_path, stub=False):
        assert not partial.exists()


def test_the_lock_leaves_a_file_of_its_name_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    lock = serve._locked(tmp_path)
    assert lock is not None
    assert serve._locked(tmp_path) is None
    lock.close()
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_lost_database_costs_no_result(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (url, _):
        shown = finished(url, submitted(url))
    result = tmp_path / shown["file_path"]
    made = result.read_bytes()
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    with served(model, tmp_path, stub=False) as (url, _):
        (known,) = httpx.get(f"{url}/v1/videos").json()["data"]
        assert known == shown
        assert httpx.get(f"{url}/v1/videos/{known['id']}/content").content == made
        httpx.delete(f"{url}/v1/videos/{known['id']}").raise_for_status()
    assert not result.exists()
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    with served(model, tmp_path, stub=False) as (url, _):
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_results_of_an_earlier_version_are_found(model: Path, tmp_path: Path) -> None:
    """An earlier version kept results in the output folder itself."""
    jobs = opened(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", JobSpec("a", (64, 48), 5, 2, 0))
    jobs.add(job)
    jobs.update(job, status="completed", completed=job.created, files=job.names())
    jobs.close()
    (tmp_path / job.names()[0]).write_bytes(b"a video")
    for _ in range(2):
        with served(model, tmp_path, stub=False) as (url, _):
            assert httpx.get(f"{url}/v1/videos/{job.id}/content").content == b"a video"
    assert [path.parent.name for path in tmp_path.rglob("*.mp4")] == ["results"]


def test_a_change_that_is_not_on_disk_is_not_in_memory(tmp_path: Path) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", JobSpec("a", (64, 48), 5, 2, 0))
    jobs.add(job)
    jobs.close()
    with pytest.raises(sqlite3.ProgrammingError):
        jobs.update(job, status="completed", files=job.names())
    assert (job.status, job.files) == ("queued", [])


def test_ranks_have_work_while_the_database_is_locked(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        videos = [submitted(url) for _ in range(3)]
        attempts = [rank.receive()["attempt"] for _ in range(2)]
        with locked(tmp_path):
            rank.send("started", attempt=attempts[0])
            rank.send("denoised", attempt=attempts[0], seconds=0.1)
            attempts.append(rank.receive()["attempt"])
        for attempt in attempts:
            rank.send("finished", attempt=attempt, decode=DECODE)
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 3


def test_pictures_that_are_made_while_the_database_is_locked_are_answered(
    home: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    with served(home / "qwen-image", tmp_path) as (url, stub), ThreadPoolExecutor(1) as pool:
        assert stub is not None
        stub.held.set()
        body = {"prompt": "a", "size": "64x48", "response_format": "url"}
        asked = pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=60)
        heard("progress")
        with locked(tmp_path):
            stub.held.clear()
            heard("finished")
        answer = asked.result(timeout=20)
        assert answer.status_code == 200, answer.text
        assert httpx.get(answer.json()["data"][0]["url"]).content.startswith(b"\x89PNG")


def test_jobs_of_ended_ranks_are_tried_again_after_the_database_was_locked(
    model: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        first = Rank(tmp_path)
        video = submitted(url)
        first.send("started", attempt=first.receive()["attempt"])
        heard("beat")
        heard("started")
        with locked(tmp_path):
            second = Rank(tmp_path)
            heard("beat")
        attempt = second.receive()["attempt"]
        second.send("started", attempt=attempt)
        second.send("finished", attempt=attempt, decode=DECODE)
        assert finished(url, video)["status"] == "completed"


def test_an_end_that_is_not_written_when_the_ranks_end_is_kept(
    model: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        first = Rank(tmp_path)
        video = submitted(url)
        attempt = first.receive()["attempt"]
        with locked(tmp_path):
            first.send("failed", attempt=attempt, code="input_lost", message="no picture")  # before the attempt started
            heard("failed")
            second = Rank(tmp_path)
        shown = finished(url, video, 10)
        assert (shown["status"], shown["error"]) == ("failed", {"code": "input_lost", "message": "no picture"})
        other = submitted(url)
        assert other in second.receive()["paths"][0]  # the first job was not sent again


def test_the_job_of_a_client_that_leaves_while_the_database_is_locked_is_removed(
    home: Path, tmp_path: Path, heard: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Event()
    delete = JobTable.delete

    def noted(self: JobTable, job: str) -> None:
        try:
            delete(self, job)
        except sqlite3.OperationalError:
            refused.set()
            raise

    monkeypatch.setattr(JobTable, "delete", noted)
    with served(home / "qwen-image", tmp_path) as (url, stub):
        assert stub is not None
        stub.held.set()
        client = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({"prompt": "a", "size": "64x48"})
        client.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        heard("progress")
        with locked(tmp_path):
            client.close()
            assert refused.wait(20)
        heard("cancelled")
        assert httpx.get(f"{url}/health").json()["jobs"] == {"queued": 0, "in_progress": 0}


def test_a_job_deleted_before_its_end_is_on_disk_stays_deleted(
    model: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        video, other = submitted(url), submitted(url)
        attempts = [rank.receive()["attempt"] for _ in range(2)]
        with locked(tmp_path):
            rank.send("finished", attempt=attempts[0], decode=DECODE)
            rank.send("finished", attempt=attempts[1], decode=DECODE)
            heard("finished")
            heard("finished")
            refused = httpx.delete(f"{url}/v1/videos/{video}", timeout=30)
            assert (refused.status_code, refused.headers["retry-after"].isdigit()) == (503, True)
        httpx.delete(f"{url}/v1/videos/{video}").raise_for_status()
        assert finished(url, other)["status"] == "completed"
        assert httpx.get(f"{url}/v1/videos/{video}").status_code == 404


def test_a_job_that_cannot_be_written_is_refused(home: Path, tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (64, 48)).save(png, "png")
    picture = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    body = {"prompt": "a", "input_reference": picture, **SMALL}
    with served(home / "wan2.1-i2v", tmp_path, stub=False) as (url, _):
        with locked(tmp_path):
            refused = httpx.post(f"{url}/v1/videos", json=body, timeout=30)
        assert refused.status_code == 503
        assert refused.headers["retry-after"].isdigit()
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "database_unavailable")
        assert not list((tmp_path / ".inputs").iterdir())
        assert httpx.post(f"{url}/v1/videos", json=body).status_code == 200


def test_a_job_for_which_the_disk_has_no_room_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = JobTable.prepare

    def no_room(self: JobTable) -> None:
        prepare(self)
        self._db.execute("PRAGMA max_page_count = 1")  # below the current size, so that the database cannot grow

    monkeypatch.setattr(JobTable, "prepare", no_room)
    with served(model, tmp_path, stub=False) as (url, _):
        refused = httpx.post(f"{url}/v1/videos", json={"prompt": "a" * 30_000, **SMALL})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")


def test_a_result_that_cannot_be_removed_keeps_no_other_one(
    model: Path, tmp_path: Path, swept: Callable[[], BaseException | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(model, tmp_path) as (url, _):
        stuck = [finished(url, submitted(url))["id"] for _ in range(3)][1]
    refuse = True

    def discard(path: Path) -> None:
        if refuse and stuck in path.name:
            raise PermissionError(path)
        media.discard(path)

    monkeypatch.setattr("halovae.serving.results.discard", discard)
    with served(model, tmp_path, stub=False, expire_after=0.0) as (url, _):
        while [one["id"] for one in httpx.get(f"{url}/v1/videos").json()["data"]] != [stuck]:
            swept()
        refuse = False
        while httpx.get(f"{url}/v1/videos").json()["data"]:
            swept()
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_server_that_no_longer_hears_its_ranks_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async def broken(self: Dispatcher) -> None:
        raise zmq.ContextTerminated

    async def agent_gone() -> None:
        """End a server that would otherwise keep running."""
        await asyncio.sleep(20)

    monkeypatch.setattr(Dispatcher, "run", broken)
    monkeypatch.setattr(serve, "_agent_gone", agent_gone)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(typer.Exit) as ended:
        serve._run_front(rank_settings(model, tmp_path), front_settings(model), None)
    assert ended.value.exit_code == 1
    assert "the dispatcher ended" in caplog.text
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "the dispatcher ended (ContextTerminated" in errors[0]


def test_a_damaged_database_ends_the_dispatcher(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged(self: JobTable, job: Job, **changes: Any) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(JobTable, "update", damaged)
    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        submitted(url)
        rank.send("started", attempt=rank.receive()["attempt"])
        deadline = time.monotonic() + 20
        while "the dispatcher ended: the server ends too" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "the dispatcher ended: the server ends too" in caplog.text
    assert "malformed" in caplog.text
