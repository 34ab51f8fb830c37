"""What tests of the server share."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halovae.pipelines import tiny
from halovae.serving.dispatch import Dispatcher


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that makes videos."""
    folder = tmp_path_factory.mktemp("models") / "wan2.1"
    tiny.make_model("wan2.1", folder)
    return folder


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
