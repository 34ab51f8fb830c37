"""What tests of the server share."""

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.stub_ranks import StubRanks, served

from halovae.pipelines import tiny
from halovae.serving import app
from halovae.serving.dispatch import Dispatcher

MIB = 2**20


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that makes videos."""
    folder = tmp_path_factory.mktemp("models") / "wan2.1"
    tiny.make_model("wan2.1", folder)
    return folder


@pytest.fixture(scope="package")
def hostile_videos(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of videos that takes large bodies."""
    with served(model, tmp_path_factory.mktemp("videos"), body=64 * MIB) as (url, _):
        yield url


@pytest.fixture(scope="package")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that edits pictures."""
    folder = tmp_path_factory.mktemp("models") / "qwen-image-edit"
    tiny.make_model("qwen-image-edit", folder)
    return folder


@pytest.fixture(scope="package")
def hostile_edits(editor: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StubRanks]]:
    """A server of edits that takes large bodies: its URL, and its ranks."""
    with served(editor, tmp_path_factory.mktemp("edits"), body=64 * MIB) as (url, stub):
        assert stub is not None
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.01)
        yield url, stub


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of asynchronous tests."""
    return "asyncio"


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`heard(kind)` waits until the front has handled the next message of this kind."""
    kinds: queue.Queue[str] = queue.Queue()
    take = Dispatcher._take

    async def noted(self: Dispatcher, peer: bytes, message: dict[str, Any]) -> None:
        try:
            await take(self, peer, message)
        finally:
            kinds.put(message["kind"])

    def wait(kind: str) -> None:
        while kinds.get(timeout=60) != kind:
            pass

    monkeypatch.setattr(Dispatcher, "_take", noted)
    return wait


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], BaseException | None]:
    """`swept()` waits for the next sweep to end, and returns its error, or None."""
    ends: queue.Queue[BaseException | None] = queue.Queue()
    expire = Dispatcher.expire

    async def noted(self: Dispatcher) -> None:
        error: BaseException | None = None
        try:
            await expire(self)
        except BaseException as raised:
            error = raised
            raise
        finally:
            ends.put(error)

    monkeypatch.setattr(Dispatcher, "expire", noted)
    monkeypatch.setattr(app, "_SWEEP", 0.01)
    return lambda: ends.get(timeout=20)
