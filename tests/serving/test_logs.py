"""Logs: of requests, of what changes jobs, and their format."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.clients import SMALL, until
from serving.stub_ranks import StubRanks, served

from halovae.serving import logs
from halovae.serving.jobs import Job, JobSpec
from halovae.serving.settings import LogFormat, LogLevel

Records = list[logging.LogRecord]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StubRanks]]:
    with served(model, tmp_path_factory.mktemp("server")) as (url, stub):
        assert stub is not None
        yield url, stub


@pytest.fixture
def restored() -> Iterator[None]:
    """Leave the logs of this process as they are."""
    root = logging.getLogger()
    handlers, level, own = root.handlers[:], root.level, logging.getLogger("halovae").level
    for handler in handlers:
        root.removeHandler(handler)  # else they would be closed
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("halovae").setLevel(own)


def logged(caplog: pytest.LogCaptureFixture, name: str, count: int) -> Records:
    """Wait until a logger has logged so many times, and return its records."""
    deadline = time.monotonic() + 30
    while len(found := [record for record in caplog.records if record.name == name]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_requests_are_logged_without_their_query(
    server: tuple[str, StubRanks], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "halovae.access")
    url, _ = server
    answer = httpx.get(f"{url}/v1/videos?after=secret", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"

    def refused() -> list[dict[str, Any]]:
        return [record.__dict__ for record in caplog.records if record.__dict__.get("status") == 400]

    until(lambda: bool(refused()))
    (facts,) = refused()
    assert {name: facts[name] for name in ("method", "path", "status", "bytes", "client", "key")} == {
        "method": "GET", "path": "/v1/videos", "status": 400, "bytes": len(answer.content), "client": "127.0.0.1",
        "key": None,
    }  # fmt: skip
    assert facts["seconds"] > 0
    assert "secret" not in str(facts)


def test_probes_that_succeed_are_not_logged(server: tuple[str, StubRanks], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "halovae.access")
    url, _ = server
    for path in ("/livez", "/metrics", "/health/nothing"):
        httpx.get(url + path)
    assert [record.__dict__["path"] for record in logged(caplog, "halovae.access", 1)] == ["/health/nothing"]


@pytest.mark.parametrize("sent", [b"x" * 129, b"", b"\xff", b"a\tb", None])
def test_a_request_id_that_is_not_sane_is_replaced(sent: bytes | None, server: tuple[str, StubRanks]) -> None:
    headers = {} if sent is None else {b"x-request-id": sent}
    ids = [httpx.get(f"{server[0]}/livez", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert ids[0] != ids[1]


def test_errors_and_refusals_have_a_request_id(server: tuple[str, StubRanks]) -> None:
    for headers in ({}, {"host": "evil.example"}):
        answer = httpx.get(f"{server[0]}/nothing", headers={"x-request-id": "a", **headers})
        assert answer.headers["x-request-id"] == "a"


def test_deletions_and_cancellations_are_logged_with_the_key(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "halovae.audit")
    with served(model, tmp_path, api_key="secret") as (url, stub):
        assert stub is not None
        stub.held.set()
        headers = {"authorization": "Bearer secret"}
        made = [
            httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}, headers=headers).json()["id"]
            for _ in range(2)
        ]
        httpx.post(f"{url}/v1/videos/{made[0]}/cancel", headers=headers)
        httpx.delete(f"{url}/v1/videos/{made[1]}", headers=headers)
        httpx.delete(f"{url}/v1/videos/{made[1]}", headers=headers)  # 404
        httpx.delete(f"{url}/v1/videos/{made[0]}")  # 401
        stub.held.clear()
        changes = [
            (record.message, record.__dict__["job"], record.__dict__["key"])
            for record in logged(caplog, "halovae.audit", 2)
            if record.message != "queued"
        ]
    assert changes == [("cancelled", made[0], "default"), ("deleted", made[1], "default")]


def test_prompts_are_logged_only_if_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "halovae.audit")
    job = Job.new("video", "tiny", JobSpec("a cat", (64, 48), 5, 2, 0, "a dog"), "alice")
    for prompts in (False, True):
        logs.queued(job, prompts)
    quiet, full = (record.__dict__ for record in caplog.records)
    assert "a cat" not in str(quiet)
    assert "a dog" not in str(quiet)
    assert (full["prompt"], full["negative_prompt"]) == ("a cat", "a dog")
    assert (quiet["job"], quiet["key"], quiet["size"], quiet["frames"]) == (job.id, "alice", "64x48", 5)


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs_have_one_line_each_whatever_clients_send(
    form: LogFormat, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(form)
    evil = "a\x1b[31mb\nc\u202ed"
    logging.getLogger("halovae.serving.test").info("%s", evil, extra={"path": evil})
    logging.getLogger("some.library").warning("a library's")
    logging.getLogger("some.library").info("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines) or form == "text"
    assert "\x1b[31m" not in lines[0]
    assert r"a\x1b[31mb\nc\u202ed" in lines[0] or form == "json"
    if form == "json":
        first, second = map(json.loads, lines)
        assert (first["event"], first["path"], first["level"], first["logger"]) == (
            evil, evil, "info", "halovae.serving.test"
        )  # fmt: skip
        assert second["event"] == "a library's"


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_message_of_an_error_forges_a_line(
    form: LogFormat, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(form)
    evil = "a\n2026-01-01T00:00:00Z [info     ] forged\x1b[31m\u2028\r"

    def fails() -> None:
        try:
            raise KeyError(evil)
        except KeyError as error:
            try:
                raise RuntimeError(evil) from error
            except RuntimeError:
                raise OSError(evil) from None

    for cause in (True, False):
        try:
            try:
                fails()
            except OSError as error:
                raise (ValueError(evil) if cause else TypeError(evil)) from (error if cause else None)
        except (ValueError, TypeError):
            logging.getLogger("halovae.test").exception("it failed")
    out = capsys.readouterr().err
    assert not any(line.startswith("2026-01-01") for line in out.splitlines())
    assert "\x1b[31m" not in out
    assert out.count("forged") == 3  # of the first one its cause, too
    assert out.count("direct cause") == 1
    for name in ("ValueError", "TypeError", "OSError", "in fails"):
        assert name in out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups of errors")
def test_the_errors_of_a_group_are_logged(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    group = ExceptionGroup("some", [ValueError("one\n2"), TypeError("two")])  # type: ignore[name-defined, unused-ignore]  # noqa: F821
    logging.getLogger("halovae.test").error("it failed", exc_info=group)
    lines = capsys.readouterr().err.splitlines()
    assert r"  ValueError: one\n2" in lines
    assert "  TypeError: two" in lines


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error", "library"]),
        ("info", ["info", "warning", "error", "library"]),
        ("warning", ["warning", "error", "library"]),
        ("error", ["error"]),
    ],
)
def test_only_what_reaches_the_level_is_logged(
    level: LogLevel, shown: list[str], restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("json", level)
    for name in ("debug", "info", "warning", "error"):
        logging.getLogger("halovae.test").log(getattr(logging, name.upper()), name)
    logging.getLogger("some.library").info("chatter")
    library = logging.getLogger("uvicorn.error")
    library.setLevel(logging.WARNING)  # as uvicorn does itself
    library.warning("library")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == shown


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_show_no_values(form: LogFormat, restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(form)

    def fails(prompt: str) -> None:
        raise ValueError("it failed")

    try:
        fails("a secret " + "prompt")
    except ValueError:
        logging.getLogger("halovae.test").exception("bad")
    shown = capsys.readouterr().err
    assert "it failed" in shown
    assert "a secret prompt" not in shown


def test_logs_within_a_request_hold_its_id(
    model: Path, tmp_path: Path, restored: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("json")

    async def fails(*_: object) -> None:
        raise ValueError("it failed")

    with served(model, tmp_path, stub=False) as (url, _):
        monkeypatch.setattr("halovae.serving.store.JobStore.read", fails)
        assert httpx.get(f"{url}/v1/videos", headers={"x-request-id": "mine"}).status_code == 500
        monkeypatch.undo()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"mine"' in line]
    assert {"halovae.serving.errors", "halovae.access"} <= {line["logger"] for line in lines}
    (access,) = (line for line in lines if line["logger"] == "halovae.access")
    assert access["status"] == 500
