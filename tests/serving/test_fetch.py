"""Pictures fetched from URLs: only from the public internet, and within bounds."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import pytest

from halovae.serving import fetch
from halovae.serving.errors import ApiError


class Site(BaseHTTPRequestHandler):
    """A server that clients name in `reference_url`."""

    running = most = 0
    lock, four = threading.Lock(), threading.Barrier(4)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        assert self.headers["Accept-Encoding"] == "identity"
        if name == "drop":
            return
        self.send_response({"moved": 302, "loop": 302, "gone": 404}.get(name, 200))
        if name in ("moved", "loop"):
            self.send_header("Location", "http://[x]/" if name == "moved" else "loop")
        if name == "gzip":
            self.send_header("Content-Encoding", "gzip, gzip")
        self.end_headers()
        if name == "slow":
            with contextlib.suppress(OSError):
                for _ in range(300):
                    self.wfile.write(b"a")
                    time.sleep(0.1)
        elif name == "many":
            with Site.lock:
                Site.running += 1
                Site.most = max(Site.most, Site.running)
            Site.four.wait(30)
            with Site.lock:
                Site.running -= 1
        with contextlib.suppress(OSError):
            self.wfile.write(b"x" * (5000 if name == "large" else 1000))

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A site on this machine that counts as public."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    monkeypatch.setattr(fetch, "_PORTS", (server.server_port, 1))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gzip", "compressed"),
        ("large", "more than 2000 bytes"),
        ("moved", "cannot be fetched within"),
        ("loop", "more than 2 redirects"),
        ("gone", "404"),
        ("drop", "cannot be fetched within"),
        ("slow", "cannot be fetched within"),
    ],
)
async def test_what_a_url_leads_to_is_bounded(
    name: str, words: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SECONDS", 1.0 if name == "slow" else 30.0)
    with pytest.raises(ApiError, match=words) as error:
        await fetch.fetch(f"{site}/{name}", 2000, "reference_url")
    assert (error.value.status, error.value.param) == (400, "reference_url")


@pytest.mark.anyio
async def test_four_urls_are_fetched_at_once(site: str) -> None:
    Site.most = 0
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(fetch.fetch, f"{site}/many", 2000, "reference_url")
    assert Site.most == 4
    assert await fetch.fetch(f"{site}/plain", 1000, "reference_url") == b"x" * 1000


@pytest.mark.anyio
async def test_a_lookup_of_a_host_may_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(fetch, "_LOOKUP_SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: go.wait(60) and [])
    with pytest.raises(ApiError, match="expected a host on the public internet"):
        await fetch.fetch("http://example.com/", 2000, "reference_url")
    assert not go.is_set()
    go.set()


@pytest.mark.anyio
async def test_an_open_port_cannot_be_told_from_a_closed_one(site: str) -> None:
    messages = set()
    for url in (f"{site}/drop", f"{site.replace('http', 'https')}/", "http://127.0.0.1:1/"):
        with pytest.raises(ApiError) as error:
            await fetch.fetch(url, 2000, "reference_url")
        messages.add(error.value.message)
    assert len(messages) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url",
    [
        "ftp://8.8.8.8/a", "http://8.8.8.8/\x01", "http://\uff18.\uff18.\uff18.\uff18/", "http://8.8.8.8:99999/",
        "http://[", "http:///a", "//8.8.8.8/", "a",
        "http://8.8.8.8:22/", "https://8.8.8.8:8080/", "http://me:secret@8.8.8.8/", f"http://{'a' * 300}/",
        "http://localhost/", "http://0x7f.1/", "http://2130706433/", "http://[::1%25lo]/", "http://a..b/",
        "http://no-such-host.invalid/",
    ],
)  # fmt: skip
async def test_urls_that_are_not_of_public_sites_are_refused(url: str) -> None:
    with pytest.raises(ApiError, match="expected an? http|expected a host on the public internet") as error:
        await fetch.fetch(url, 2000, "reference_url")
    assert (error.value.status, error.value.param) == (400, "reference_url")
