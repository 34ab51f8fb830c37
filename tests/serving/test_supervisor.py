"""How often the supervisor restarts ranks."""

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest

from halovae.errors import RankError
from halovae.serving import supervisor


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([False], 1),  # the next start would fail too
        ([True, True, False, False, True] + 5 * [False], 10),  # something may kill them while they load
    ],
)
def test_ranks_that_end_before_they_are_ready_are_given_up(
    starts: list[bool], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def launch(ranks: int, serve: Any, settings: Any, ready: threading.Event) -> None:
        started.append(ranks)
        assert not ready.is_set()
        if starts[len(started) - 1]:
            ready.set()
        raise RankError("a rank failed")

    monkeypatch.setattr(supervisor, "launch", launch)
    monkeypatch.setattr("os.setsid", lambda: None)
    monkeypatch.setattr(supervisor, "_SOON", 0.0)
    monkeypatch.setattr(supervisor, "end_with_parent", lambda: None)
    monkeypatch.setattr(supervisor, "_PAUSES", (0.0, 0.0))
    settings: Any = Path("unused")
    ready: Any = threading.Event()
    received, reasons = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit) as gave_up:
        supervisor._watch_over(2, settings, ready, False, reasons)
    assert gave_up.value.code == supervisor._GAVE_UP
    assert started == [2] * expected
    assert received.recv() == "a rank failed"
