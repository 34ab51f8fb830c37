"""Request bodies: large, odd, and malformed ones, and that others are answered meanwhile."""

import concurrent.futures
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving.clients import connected, until
from serving.hostile import MIB, PLAIN, data_url, edit, error_of, many_fields, picture
from serving.stub_ranks import StubRanks, served

from halovae.serving import pictures, requests, submission
from halovae.serving.schemas import VideoRequest

JSON = {"content-type": "application/json"}


@contextlib.contextmanager
def blocked(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[threading.Event]:
    """Let calls of a function wait until the block ends. Yields an event that is set once a call waits."""
    call, waits, go = getattr(owner, name), threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        waits.set()
        assert go.wait(60)
        return call(*args)

    monkeypatch.setattr(owner, name, slow)
    try:
        yield waits
    finally:
        go.set()


@pytest.mark.parametrize(
    ("owner", "name", "body"),
    [
        (requests, "_from_json", {"json": {"prompt": "a", "image": data_url(picture())}}),
        (requests, "_from_form", {"data": {"prompt": "a"}, "files": {"image": picture()}}),
        (pictures, "checked", {"data": {"prompt": "a"}, "files": {"image": picture()}}),
        (submission, "_write", {"data": {"prompt": "a"}, "files": {"image": picture()}}),
        (pictures, "converted", {"data": {"prompt": "a"}, "files": {"image": picture()}}),
    ],
)
def test_the_front_answers_while_a_request_is_worked_on(
    owner: Any, name: str, body: dict[str, Any], hostile_edits: tuple[str, StubRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = hostile_edits
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with blocked(monkeypatch, owner, name) as waits:
            answer = pool.submit(httpx.post, f"{url}/v1/images/edits", timeout=60, **body)
            assert waits.wait(30)
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            assert not answer.done()
        assert answer.result().status_code == 200


def test_the_first_unknown_field_is_named_before_others_are_looked_at(
    hostile_videos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoRequest, "model_validate", None)  # it would build an error for each
    answer = httpx.post(f"{hostile_videos}/v1/videos", content=many_fields(MIB - 100), headers=JSON)
    assert error_of(answer)["message"] == "unknown field 'field000000'"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"prompt": "a", "\\ud800": 1}', "unknown field"),
        (f'{{"prompt": "a", "{"x" * 10_000}": 1}}', "unknown field 'xxx"),
        (f'{{"prompt": {"[" * 900}{"]" * 900}}}', "a list of 1"),
        (f'{{"prompt": "a", "seed": {"9" * 4000}}}', "seed"),
        (f'{{"prompt": "a", "seed": {"9" * 5000}}}', "JSON"),
        ('{"prompt": "a", "input_reference": "data:image/png;base64,\u00e9"}', "pictures"),
    ],
)
def test_odd_names_and_values_give_a_short_error(body: str, words: str, hostile_videos: str) -> None:
    error = error_of(httpx.post(f"{hostile_videos}/v1/videos", content=body.encode(), headers=JSON))
    assert words in error["message"]
    assert len(json.dumps(error)) < 500


def test_a_picture_may_be_larger_than_the_fields(hostile_edits: tuple[str, StubRanks]) -> None:
    url, _ = hostile_edits
    noise = io.BytesIO()
    Image.effect_noise((1400, 1400), 100).save(noise, "png")
    body = {"prompt": "a", "size": "64x48", "image": data_url(noise.getvalue())}
    assert len(body["image"]) > MIB
    assert httpx.post(f"{url}/v1/images/edits", json=body, timeout=60).status_code == 200
    escaped = json.dumps(body).replace("/", "\\/")  # as PHP writes it
    assert httpx.post(f"{url}/v1/images/edits", content=escaped, headers=JSON, timeout=60).status_code == 200
    answer = httpx.post(f"{url}/v1/images/edits", json={**body, "user": "x" * MIB}, timeout=60)
    assert "beside the 1 picture(s)" in error_of(answer, 413)["message"]


_texts = st.lists(st.sampled_from(["data:", '"', "\\", "/", ",", "[", "é", "a", "\n"]), max_size=8).map("".join)


_values = st.recursive(_texts, lambda inner: st.lists(inner) | st.dictionaries(_texts, inner), max_leaves=8)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for inner in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _strings(inner)


@settings(max_examples=300, deadline=None)
@given(_values, st.integers(0, 3), st.booleans())
def test_only_the_insides_of_strings_count_as_pictures(value: Any, most: int, slashes: bool) -> None:
    body = json.dumps(value, ensure_ascii=False)
    lengths = sorted(len(json.dumps(text, ensure_ascii=False).encode()) for text in _strings(value))
    if slashes:
        body = body.replace("/", "\\/")
        lengths = [2 * length for length in lengths]
    assert requests._picture_bytes(body.encode(), most) <= sum(lengths[-most:] if most else [])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "text/plain; application/json"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/problem+json"}, 200),
    ],
)
def test_json_is_read_only_if_it_is_declared(headers: dict[str, str], status: int, hostile_videos: str) -> None:
    answer = httpx.post(f"{hostile_videos}/v1/videos", content=json.dumps(PLAIN).encode(), headers=headers)
    assert answer.status_code == status
    if status == 415:
        assert "expected" in answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "none", "utf-16"])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=b", "application/x-www-form-urlencoded"])
def test_forms_are_utf8(kind: str, charset: str, hostile_videos: str) -> None:
    answer = httpx.post(
        f"{hostile_videos}/v1/videos", content=b"prompt=\xff", headers={"content-type": f"{kind}; charset={charset}"}
    )
    assert error_of(answer)["code"] == "invalid_form"


@pytest.mark.parametrize(
    ("fields", "files", "status", "words"),
    [
        ({f"f{i}": "a" for i in range(101)}, {}, 400, "Too many fields"),
        ({}, [("image", picture())] * 17, 400, "Too many files"),
        ({"user": "x" * (MIB + 1)}, {}, 400, "exceeded"),
        ({"user": "x" * (MIB - 9), "model": "x" * 10}, {}, 413, "beside its files"),
        ({"prompt": "b", "prompt[]": "a"}, {}, 400, "more than once"),
        ({}, {"user": picture()}, 400, "a file is not expected"),
    ],
)
def test_forms_are_bounded(
    fields: Any, files: Any, status: int, words: str, hostile_edits: tuple[str, StubRanks]
) -> None:
    assert words in error_of(edit(hostile_edits[0], files or {"image": picture()}, **fields), status)["message"]


def test_a_repeated_form_is_the_same_request(hostile_edits: tuple[str, StubRanks]) -> None:
    url, stub = hostile_edits
    before, headers = len(stub.seen), {"Idempotency-Key": "form"}
    for data, status in [(picture(), 200), (picture(), 200), (picture(size=(9, 9)), 400)]:
        answer = httpx.post(  # each with a boundary of its own
            f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": data}, headers=headers, timeout=60
        )
        assert answer.status_code == status, answer.text
    assert len(stub.seen) == before + 1


def test_bodies_of_all_requests_together_are_bounded(model: Path, tmp_path: Path) -> None:
    body = json.dumps(PLAIN).encode()
    header = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served(model, tmp_path, stub=False, body_memory=100_000) as (url, _):

        def busy() -> bool:
            answer = httpx.post(f"{url}/v1/videos", content=body, headers=JSON)
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "busy"
                assert answer.headers["retry-after"].isdigit()
                assert "--max-body-memory" in answer.json()["error"]["message"]
            return answer.status_code == 503

        assert not busy()
        with connected(url, header, b"Content-Length: 150000\r\n\r\n", b" " * 100_000) as held:
            until(busy)
            assert httpx.get(f"{url}/v1/videos").status_code == 200  # without a body
            held.sendall(b" " * (50_000 - len(body)) + body)  # alone, it may hold more
            assert held.recv(12) == b"HTTP/1.1 200"
        until(lambda: not busy())


def test_a_body_of_unknown_length_is_refused_once_it_is_too_much(model: Path, tmp_path: Path) -> None:
    header = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + b"9c40\r\n" + b" " * 40_000 + b"\r\n"
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(served(model, tmp_path, stub=False, body_memory=60_000))
        first = stack.enter_context(connected(url, header, b"Content-Length: 50000\r\n\r\n", b" " * 30_000))
        until(lambda: httpx.post(f"{url}/v1/videos", content=b" " * 40_000, headers=JSON).status_code == 503)
        second = stack.enter_context(connected(url, header, chunked))
        assert second.recv(12) == b"HTTP/1.1 503"
        first.sendall(b"{}" + b" " * 19_998)
        assert first.recv(12) == b"HTTP/1.1 400"


def test_pictures_count_until_they_are_on_disk(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((300, 200), 100).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "webp", quality=1)
    assert len(file.getvalue()) < 20_000  # and more than 60 kB as PNG
    with served(editor, tmp_path, body_memory=60_000) as (url, stub):
        assert stub is not None
        stub.held.set()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            with blocked(monkeypatch, submission, "_write") as waits:
                first = pool.submit(edit, url, {"image": file.getvalue()})
                assert waits.wait(30)
                assert error_of(edit(url), 503)["code"] == "busy"
            second = pool.submit(edit, url)  # the first one still waits for its picture
            until(lambda: sum(httpx.get(f"{url}/health").json()["jobs"].values()) == 2)
            stub.held.clear()
            assert [first.result().status_code, second.result().status_code] == [200, 200]
