"""The operator's limits, and what errors tell clients and the log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.hostile import PLAIN, edit, error_of
from serving.stub_ranks import served

from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.limits import Limits


def test_limits_above_the_usual_ones_are_taken(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, steps=5000, results=20, frames=4000) as (url, _):
        more = {"num_inference_steps": 2000, "n": 20, "num_frames": 3001}
        assert httpx.post(f"{url}/v1/videos", json={**PLAIN, **more}).status_code == 200


@pytest.mark.parametrize("name", ["body", "fields", "pixels", "frames", "steps", "results", "picture_pixels", "queue"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0: expected 1 or more"):
        Limits(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("out_of_memory", 400), ("timeout", 400), ("disk_full", 507), ("cannot_write", 500), ("internal_error", 500),
        ("interrupted", 500),
    ],
)  # fmt: skip
def test_failed_pictures_say_whether_to_retry(code: str, status: int, editor: Path, tmp_path: Path) -> None:
    with served(editor, tmp_path) as (url, stub):
        assert stub is not None
        send = stub.channel.send
        stub.channel.send = lambda kind, attempt, **facts: send(  # type: ignore[method-assign]
            kind, attempt, **{**facts, **({"code": code} if kind == "failed" else {})}
        )
        stub.fails = True
        answer = edit(url)
        assert error_of(answer, status)["code"] == code
        assert answer.headers.get("x-should-retry") == (None if status == 400 else "false")


def test_an_error_that_passes_may_be_retried() -> None:
    assert "x-should-retry" not in ApiError(503, "a", headers={"Retry-After": "2"}).response().headers
    assert ApiError(503, "a").response().headers["x-should-retry"] == "false"


@pytest.mark.parametrize("error", [RuntimeError("a"), ValueError("b")])
def test_a_job_that_is_not_queued_leaves_no_pictures(
    error: Exception, editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        assert len([*(tmp_path / ".inputs").iterdir()]) == 1
        raise error

    with served(editor, tmp_path) as (url, _):
        monkeypatch.setattr(Dispatcher, "submit", fail)
        error_of(edit(url), 500)
        assert not [*(tmp_path / ".inputs").iterdir()]


def test_pictures_of_a_job_that_is_queued_stay(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit: Callable[..., Any] = Dispatcher.submit

    async def fail(self: Dispatcher, job: Any) -> None:
        await submit(self, job)
        raise RuntimeError

    with served(editor, tmp_path, stub=False) as (url, _):
        monkeypatch.setattr(Dispatcher, "submit", fail)
        error_of(edit(url), 500)
        assert len([*(tmp_path / ".inputs").iterdir()]) == 1
