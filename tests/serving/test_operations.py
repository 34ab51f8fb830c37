"""What operators see and rely on: probes, HEAD, metrics, and limits of connections."""

import contextlib
import logging
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from serving.clients import connected, finished, submitted
from serving.stub_ranks import DECODE, Rank, StubRanks, front_settings, rank_settings, served

from halovae.pipelines.specs import Prompt
from halovae.serving import connections, guards
from halovae.serving.app import make_app
from halovae.serving.channel import RankChannel
from halovae.serving.files import Attempt, Batch, Writer
from halovae.serving.metrics import Metrics
from halovae.serving.replicas import Replica
from halovae.serving.store import JobStore


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StubRanks]]:
    with served(model, tmp_path_factory.mktemp("server")) as (url, stub):
        assert stub is not None
        yield url, stub


def received(connection: socket.socket) -> bytes:
    """Return all that the server sends until it closes the connection."""
    pieces = []
    while piece := connection.recv(2**16):
        pieces.append(piece)
    return b"".join(pieces)


def until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.anyio
async def test_metrics_show_a_replica_that_was_added_as_they_were_read(tmp_path: Path) -> None:
    jobs = JobStore(tmp_path / "jobs.sqlite")
    text = await Metrics().text(jobs, True, {"0": Replica("0")}, loads={})
    jobs.close()
    assert b'halovae_replica_jobs{replica="0"} 0.0' in text


def test_a_server_that_is_ending_lives_but_is_not_ready(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, drain=30) as (url, stub):
        assert stub is not None
        until_ready(url)
        stub.held.set()
        video = submitted(url)
        while httpx.get(f"{url}/v1/videos/{video}").json()["status"] != "in_progress":
            time.sleep(0.02)
        stub.end_server()
        while (answer := httpx.get(f"{url}/readyz")).status_code == 200:
            time.sleep(0.02)
        assert (answer.status_code, answer.json()) == (503, {"status": "the server is ending"})
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/livez").status_code == 200
        stub.held.clear()


@pytest.mark.anyio
async def test_a_front_without_its_dispatcher_does_not_live(model: Path, tmp_path: Path) -> None:
    app = make_app(rank_settings(model, tmp_path), front_settings(model))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/livez")).status_code == 503
        async with app.router.lifespan_context(app):
            assert (await client.get("/livez")).status_code == 200
            app.state.tasks[0].cancel()
            with pytest.raises(BaseException):  # noqa: B017, PT011
                await app.state.tasks[0]
            answer = await client.get("/livez")
            assert (answer.status_code, answer.json()) == (503, {"status": "the dispatcher ended"})


def test_head_answers_as_get_without_the_body(server: tuple[str, StubRanks]) -> None:
    url, _ = server
    video = submitted(url)
    assert finished(url, video)["status"] == "completed"
    paths = ["/", "/livez", "/readyz", "/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/videos"]
    paths += [f"/v1/videos/{video}", f"/v1/videos/{video}/content", f"/v1/videos/{video}/content?variant=thumbnail"]
    with httpx.Client(base_url=url) as client:  # one connection: what follows a HEAD must be understood
        for path in paths:
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert head.headers["content-type"] == get.headers["content-type"], path
            if path != "/metrics":
                assert head.headers["content-length"] == get.headers["content-length"], path
        assert client.head("/v1/jobs").status_code == 200  # a stream without end
        assert client.head("/v1/videos/none").status_code == 404
        assert client.head("/v1/images/generations").status_code == 405
        assert client.get("/livez").status_code == 200


def test_a_download_that_only_its_header_was_asked_for_can_be_resumed(server: tuple[str, StubRanks]) -> None:
    url, _ = server
    video = submitted(url)
    finished(url, video)
    path = f"{url}/v1/videos/{video}/content"
    whole = httpx.get(path).content
    assert httpx.head(path).headers["accept-ranges"] == "bytes"
    assert httpx.get(path, headers={"range": "bytes=10-19"}).content == whole[10:20]


def test_requests_are_measured_by_route_and_class_of_status(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (url, _):
        httpx.get(f"{url}/v1/videos/one")
        httpx.get(f"{url}/v1/videos/two")
        httpx.get(f"{url}/made/up")
        httpx.request("BREW", f"{url}/v1/models")
        text = httpx.get(f"{url}/metrics").text
    route = 'route="/v1/videos/{video_id}",status="4xx"'
    assert f'halovae_http_request_seconds_count{{method="GET",{route}}} 2.0' in text
    assert 'halovae_http_request_seconds_count{method="GET",route="other",status="4xx"} 1.0' in text
    assert 'method="BREW"' not in text
    assert "halovae_http_requests_in_flight 1.0" in text
    assert "halovae_queue_wait_seconds" in text
    (free,) = re.findall(r"^halovae_disk_free_bytes (\S+)$", text, re.MULTILINE)
    assert float(free) > 0


def test_a_body_that_stops_is_not_waited_for(server: tuple[str, StubRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PIECE", 0.2)
    header = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server[0], header, b"Content-Length: 100\r\n\r\n{") as connection:
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer


def test_a_body_that_trickles_is_not_waited_for(server: tuple[str, StubRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY", 0.5)
    header = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server[0], header, b"Content-Length: 1000\r\n\r\n{") as connection:
        connection.settimeout(0.05)
        answer = b""
        for _ in range(1000):
            try:
                answer = connection.recv(2**16)
                break
            except TimeoutError:
                connection.sendall(b" ")
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_a_connection_that_sends_no_whole_header_is_closed(
    data: bytes, server: tuple[str, StubRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WAIT", 0.3)
    with connected(server[0], data) as connection:
        answer = received(connection)  # returns because the server closes it
    assert answer == b"" or (data.endswith(b"GET") and answer.count(b"HTTP/1.1") == 1)


def test_a_body_that_was_answered_already_holds_no_connection(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER", 0.3)
    with served(model, tmp_path, stub=False, api_key="secret") as (url, _):
        header = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connected(url, header, b"Content-Length: 100000\r\n\r\n") as connection:
            assert connection.recv(12) == b"HTTP/1.1 401"
            with contextlib.suppress(OSError):  # the server closes it, however the body goes on
                for _ in range(200):
                    connection.sendall(b"x")
                    time.sleep(0.05)
                pytest.fail("the connection stayed")


def test_a_server_whose_connections_all_have_requests_refuses_new_ones(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False, max_connections=2) as (url, _):
        head = b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n"
        streams = [connected(url, head) for _ in range(2)]
        for stream in streams:
            assert stream.recv(12) == b"HTTP/1.1 200"
        assert httpx.get(f"{url}/livez").status_code == 503
        streams[0].close()
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/livez").status_code != 200:
            assert time.monotonic() < deadline
        streams[1].close()


def test_the_server_opens_as_many_files_as_it_may(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hard, given = 4096, []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    assert connections.most_connections(1000) == 1000
    assert given == [(4096, 4096)]
    assert caplog.records == []
    assert connections.most_connections(10_000) == 4096 - 512
    assert "--max-connections 10000" in caplog.text
    hard = 256
    assert connections.most_connections(1000) == 128
    assert connections.most_connections(50) == 50
    hard = resource.RLIM_INFINITY
    assert connections.most_connections(10**6) == 10**6


def test_messages_that_clients_cause_do_not_flood_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    seldom = connections.Seldom()

    def passes(text: str) -> bool:
        return bool(seldom.filter(logging.makeLogRecord({"msg": text})))

    full = "socket.accept() out of system resource\nsocket: 5"
    assert [passes(full) for _ in range(3)] == [True, False, False]
    assert [passes("Invalid HTTP request received.") for _ in range(2)] == [True, False]
    assert [passes("Task exception was never retrieved") for _ in range(2)] == [True, True]
    now = 111.0
    assert [passes(full) for _ in range(2)] == [True, False]


def test_the_decode_of_a_batch_is_measured_once(model: Path, tmp_path: Path) -> None:
    def value(url: str, name: str) -> float:
        return float(re.findall(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[0])

    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        videos = [submitted(url) for _ in range(2)]
        attempts = [rank.receive()["attempt"] for _ in videos]
        for attempt in attempts:
            rank.send("started", attempt=attempt)
        for attempt in attempts:
            rank.send("finished", attempt=attempt, decode={**DECODE, "batch": 2}, first=attempt == attempts[0])
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 2
        assert value(url, 'halovae_jobs_completed_total{kind="video"}') == 2
        assert value(url, "halovae_decode_batch_count") == 1
        assert value(url, "halovae_decode_batch_sum") == 2
        assert value(url, 'halovae_decode_seconds_count{kind="video"}') == 1


def test_one_attempt_of_a_batch_is_named_the_first(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []
    channel = SimpleNamespace(
        cancelled={"b"}, deliver=lambda *_: None,
        send=lambda kind, attempt, **facts: sent.append({"kind": kind, **facts}),
    )  # fmt: skip
    writer = Writer(cast(RankChannel, channel))
    prompt = Prompt(text="a", size=(64, 48), frames=1, steps=2, seed=0, negative=None, guidance=None)
    batch = Batch([Attempt(name, prompt, (), 16.0) for name in "bac"])
    batch.sinks = {name: [] for name in "bac"}
    for attempt in batch.attempts:
        writer._run_step(batch, attempt, writer._close, DECODE)
    assert [(one["kind"], one.get("first")) for one in sent] == [
        ("cancelled", None), ("finished", True), ("finished", False)
    ]  # fmt: skip
