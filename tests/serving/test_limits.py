"""The operator's limits, and what errors tell clients and the log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.hostile import PLAIN, edit, error_of
from serving.stub_ranks import served

from halovae.serving import routes
from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.limits import Limits


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"size": "128x64"}, "size", ["128x64", "4096 pixels", "--max-pixels"]),
        ({"size": None}, "size", ["x", "(the value if none is given)", "--max-pixels"]),
        ({"num_frames": 13}, "num_frames", ["13", "9 frames", "--max-frames"]),
        ({"num_frames": 10**400}, "num_frames", ["1000", "...", "--max-frames"]),
        ({"num_frames": None, "seconds": 120, "fps": 120}, "seconds", ["120", "14401 frames", "--max-frames"]),
        ({"num_inference_steps": 4}, "num_inference_steps", ["4", "3 steps", "--max-steps"]),
        ({"n": 3}, "n", ["3", "2 results", "--max-n"]),
        ({"size": "64x48\n"}, "size", ["WIDTHxHEIGHT"]),
        ({"n": 2, "num_frames": 9, "size": "64x64", "num_inference_steps": 3}, None, []),  # each result on its own
    ],
)
def test_the_operators_limits_hold(
    fields: dict[str, Any], param: str | None, words: list[str], model: Path, tmp_path: Path
) -> None:
    with served(model, tmp_path, pixels=4096, frames=9, steps=3, results=2) as (url, _):
        answer = httpx.post(f"{url}/v1/videos", json={**PLAIN, **fields})
        if param is None:
            assert answer.status_code == 200, answer.text
            return
        error = error_of(answer)
        assert error["param"] == param
        assert all(word in error["message"] for word in [param, *words]), error["message"]


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


def test_paths_are_escaped_in_the_log(
    hostile_videos: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(routes, "find_job", fail)
    answer = httpx.get(f"{hostile_videos}/v1/videos/%1b%5b31m")
    assert error_of(answer, 500)["code"] == "internal_error"
    assert answer.headers["x-should-retry"] == "false"
    assert "'/v1/videos/\\x1b[31m' failed" in caplog.text


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
