"""How often ranks are begun anew."""

import threading
from pathlib import Path
from typing import Any

import pytest

from halovae.errors import RankError
from halovae.serving import group


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([False], 1),  # as they would end again
        ([True, True, False, False, True] + 5 * [False], 10),  # as something may kill them while they load
    ],
)
def test_ranks_that_end_before_they_are_ready_are_given_up(
    starts: list[bool], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def launch(ranks: int, serve: Any, settings: Any, ready: threading.Event) -> None:
        begun.append(ranks)
        assert not ready.is_set()
        if starts[len(begun) - 1]:
            ready.set()
        raise RankError("a rank failed")

    monkeypatch.setattr(group, "launch", launch)
    monkeypatch.setattr(group, "end_with_parent", lambda: None)
    monkeypatch.setattr(group, "_PAUSE", 0.0)
    settings: Any = Path("unused")
    ready: Any = threading.Event()
    with pytest.raises(SystemExit) as gave_up:
        group._watch_over(2, settings, ready)
    assert gave_up.value.code == group._GAVE_UP
    assert begun == [2] * expected
