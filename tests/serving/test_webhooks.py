"""Webhooks: each job that ends is told, signed, at least once, whatever the receiver and the server do."""

import logging
import queue
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import InvalidWebhookSignatureError
from serving.clients import SMALL, SPEC, finished, shown, submitted, until
from serving.hostile import picture
from serving.receivers import SECRET, Receiver, receiving
from serving.stub_ranks import free_port, served

from halovae.cli.serve_checks import _parse_secret
from halovae.serving import webhooks
from halovae.serving.jobs import Job, failed
from halovae.serving.settings import Webhook
from halovae.serving.table import VERSION, JobTable, opened


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send events again after a moment."""
    monkeypatch.setattr(webhooks, "PAUSES", (0.05, 0.2))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def to(url: str) -> Webhook:
    return Webhook(url, _parse_secret(SECRET, "secret"))


def counted(url: str, outcome: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f'halovae_webhooks_total{{outcome="{outcome}"}}'))
    return float(value)


def pending(output: Path) -> list[tuple[str, str, int]]:
    """Return job, type, and number of tries of the events that no receiver has taken."""
    database = sqlite3.connect(output / "jobs.sqlite")
    rows = database.execute("SELECT job, type, tries FROM events ORDER BY rowid").fetchall()
    database.close()
    return rows


def test_openais_client_verifies_and_reads_the_event_of_a_video(
    model: Path, tmp_path: Path, receiver: Receiver
) -> None:
    begin = int(time.time())
    with served(model, tmp_path, webhook=to(receiver.url)) as (url, _):
        video = submitted(url)
        got = receiver.next()
        event = got.unwrapped()
        assert (got.path, event.object, event.type, event.data.id) == ("/events", "event", "video.completed", video)
        assert event.id.startswith("evt_")
        assert begin <= event.created_at <= time.time()
        assert shown(url, video)["status"] == "completed"  # it can be fetched once its event is sent
        until(lambda: counted(url, "delivered") == 1)
        until(lambda: pending(tmp_path) == [])
    for secret, body in (("whsec_" + "b3RoZXI0" * 4, got.body), (SECRET, got.body.replace(b"completed", b"failed"))):
        with pytest.raises(InvalidWebhookSignatureError):
            got._replace(body=body).unwrapped(secret)


def test_a_job_that_fails_or_is_cancelled_is_told_as_failed(model: Path, tmp_path: Path, receiver: Receiver) -> None:
    with served(model, tmp_path, webhook=to(receiver.url)) as (url, stub):
        assert stub is not None
        stub.fails = True
        video = submitted(url)
        event = receiver.next().unwrapped()
        assert (event.type, event.data.id) == ("video.failed", video)
        stub.held.set()
        video = submitted(url)
        until(lambda: shown(url, video)["status"] == "in_progress")
        httpx.post(f"{url}/v1/videos/{video}/cancel").raise_for_status()
        event = receiver.next().unwrapped()
        assert (event.type, event.data.id) == ("video.failed", video)
        stub.held.clear()


def test_a_job_that_is_deleted_before_it_ends_is_not_told(model: Path, tmp_path: Path, receiver: Receiver) -> None:
    with served(model, tmp_path, webhook=to(receiver.url)) as (url, stub):
        assert stub is not None
        stub.held.set()
        deleted = submitted(url)
        httpx.delete(f"{url}/v1/videos/{deleted}").raise_for_status()
        stub.held.clear()
        video = submitted(url)
        assert receiver.next().unwrapped().data.id == video
        assert pending(tmp_path) == [] or [job for job, _, _ in pending(tmp_path)] == [video]


def test_pictures_are_told_as_images(editor: Path, tmp_path: Path, receiver: Receiver) -> None:
    with served(editor, tmp_path, webhook=to(receiver.url)) as (url, _):
        answer = httpx.post(
            f"{url}/v1/images/edits",
            data={"prompt": "a", "size": "64x48", "num_inference_steps": "2"},
            files={"image": picture()},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        event = receiver.next().unwrapped()
        assert event.type == "image.completed"
        assert event.data.id.startswith("image_")


def test_an_event_that_is_refused_is_sent_again_with_the_same_id(model: Path, tmp_path: Path) -> None:
    with receiving(500, 500) as receiver, served(model, tmp_path, webhook=to(receiver.url)) as (url, _):
        video = submitted(url)
        tries = [receiver.next() for _ in range(3)]
        assert [one.unwrapped().data.id for one in tries] == [video] * 3
        assert len({one.headers["webhook-id"] for one in tries}) == 1
        until(lambda: pending(tmp_path) == [])
        assert [counted(url, outcome) for outcome in ("delivered", "failed", "given_up")] == [1, 2, 0]
        second = submitted(url)
        assert receiver.next().unwrapped().data.id == second
        with pytest.raises(queue.Empty):
            receiver.received.get(timeout=0.5)


def test_a_redirect_is_not_followed(model: Path, tmp_path: Path) -> None:
    with receiving(302, 307) as receiver, served(model, tmp_path, webhook=to(receiver.url)) as (url, _):
        submitted(url)
        assert [receiver.next().path for _ in range(3)] == ["/events"] * 3
        assert counted(url, "failed") == 2


def test_events_outlive_a_front_whose_receiver_is_down(model: Path, tmp_path: Path) -> None:
    port = free_port()
    webhook = to(f"http://127.0.0.1:{port}/events")
    with served(model, tmp_path, webhook=webhook) as (url, _):
        videos = [submitted(url, seed=seed) for seed in range(2)]
        for video in videos:
            finished(url, video)
        until(lambda: counted(url, "failed") >= 2)
    assert [(job, kind) for job, kind, _ in pending(tmp_path)] == [(video, "video.completed") for video in videos]
    with receiving(port=port) as receiver, served(model, tmp_path, stub=False, webhook=webhook):
        assert {receiver.next().unwrapped().data.id for _ in videos} == {*videos}
        until(lambda: pending(tmp_path) == [])


def test_an_event_is_on_disk_with_the_end_of_its_job(tmp_path: Path) -> None:
    """Whenever the front is killed: one transaction holds both."""
    jobs = opened(tmp_path / "jobs.sqlite")
    jobs.keep_events()
    job = jobs.add(Job.new("video", "tiny", SPEC))
    jobs.update(job, status="in_progress")
    assert pending(tmp_path) == []
    jobs._db.execute("BEGIN")
    jobs.update(job, **failed("internal_error", "a"))
    assert jobs.next_event() == 0
    jobs._db.execute("ROLLBACK")
    assert jobs.next_event() is None
    jobs.update(job, **failed("internal_error", "a"))
    jobs.update(job, error_message="b", status="failed")  # it has ended already
    assert pending(tmp_path) == [(job.id, "video.failed", 0)]
    jobs.close()
    jobs = JobTable(tmp_path / "jobs.sqlite")  # as without a webhook
    jobs.update(jobs.add(Job.new("video", "tiny", SPEC)), status="completed")
    assert len(pending(tmp_path)) == 1
    jobs.close()


def test_a_database_without_events_gets_their_table(tmp_path: Path) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    job = jobs.add(Job.new("video", "tiny", SPEC))
    jobs._db.execute("DROP TABLE events")
    jobs._db.execute("PRAGMA user_version = 1")
    jobs.close()
    jobs = opened(tmp_path / "jobs.sqlite")
    assert jobs._db.execute("PRAGMA user_version").fetchone()[0] == VERSION
    assert jobs.get(job.id) == job
    assert jobs.due_events(time.time(), 10) == []
    jobs.close()


def test_an_event_that_is_a_day_old_is_given_up_after_a_last_try(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = to(f"http://127.0.0.1:{free_port()}/secret-path")
    with served(model, tmp_path, webhook=webhook) as (url, _):
        video = finished(url, submitted(url))["id"]
        until(lambda: counted(url, "failed") >= 1)
        caplog.clear()
        changed = sqlite3.connect(tmp_path / "jobs.sqlite", timeout=20)
        changed.execute("UPDATE events SET created = created - 90000")
        changed.commit()
        changed.close()
        until(lambda: pending(tmp_path) == [])
        assert counted(url, "given_up") == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert video in line
    assert "ConnectError" in line
    assert "secret-path" not in caplog.text


def test_a_receiver_that_does_not_answer_delays_neither_jobs_nor_the_end(
    model: Path, tmp_path: Path, receiver: Receiver
) -> None:
    receiver.released.clear()
    with served(model, tmp_path, webhook=to(receiver.url)) as (url, _):
        videos = [submitted(url, seed=seed) for seed in range(3)]
        receiver.next()
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 3
        begin = time.monotonic()
    assert time.monotonic() - begin < webhooks.TIMEOUT
    assert [job for job, _, _ in pending(tmp_path)] == videos


def test_a_receiver_that_does_not_answer_is_not_waited_for(
    model: Path, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT", 0.3)
    receiver.released.clear()
    with served(model, tmp_path, webhook=to(receiver.url)) as (url, _):
        submitted(url)
        ids = {receiver.next().headers["webhook-id"] for _ in range(2)}
        receiver.released.set()
        assert len(ids) == 1
        until(lambda: counted(url, "delivered") == 1)


def test_clients_cannot_name_a_webhook(model: Path, tmp_path: Path, receiver: Receiver) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        body: dict[str, Any] = {"prompt": "a", **SMALL}
        for name in ("webhook_url", "webhook", "callback_url"):
            answer = httpx.post(f"{url}/v1/videos", json={**body, name: receiver.url})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
