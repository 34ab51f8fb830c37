"""The page at / in a browser, as tests open it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route
from serving.stub_ranks import StubRanks, served

DESKTOP, PHONE, NARROW = ({"width": width, "height": 844} for width in (1280, 390, 320))
DEFAULTS = {"size": "832x480", "num_frames": 81, "fps": 16, "num_inference_steps": 50}
JOB = {
    "id": "video_1", "object": "video", "created_at": 1, "completed_at": None, "expires_at": None, "model": "tiny",
    "status": "in_progress", "progress": 20, "prompt": "a cat", "seconds": "5", "size": "832x480", "error": None,
    "num_frames": 81, "fps": 16.0, "seed": 7, "n": 1, "adjusted": {}, "inference_time_s": None, "peak_memory_mb": None,
    "url": None, "file_path": None, "preview": None, "decode": None,
}  # fmt: skip


# Nothing inline, and nothing of other servers.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _strict(route: Route) -> None:
    answer = route.fetch()
    route.fulfill(response=answer, headers={**answer.headers, "content-security-policy": POLICY})


@contextmanager
def page_of(
    browser: Browser, url: str, viewport: Any = DESKTOP, prepare: Callable[[Page], object] = lambda page: None,
    **options: Any,
) -> Iterator[Page]:  # fmt: skip
    """Open the page with a strict policy, and check that it keeps to its server and that its script raises no error."""
    touch = viewport is not DESKTOP
    context = browser.new_context(viewport=viewport, has_touch=touch, is_mobile=touch, **options)
    page = context.new_page()
    called: list[str] = []
    logged: list[str] = []
    page.on("request", lambda request: called.append(request.url))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("console", lambda said: logged.append(said.text) if "Content Security Policy" in said.text else None)
    page.route(f"{url}/", _strict)
    prepare(page)
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert all(address.startswith((url, f"blob:{url}", "data:")) for address in called), called
    assert logged == []


@contextmanager
def stubbed(model: Path, output: Path, **options: Any) -> Iterator[tuple[str, StubRanks]]:
    """Run a front, and yield its URL and its stub ranks."""
    with served(model, output, **options) as (url, stub):
        assert stub is not None
        yield url, stub


def told(*jobs: dict[str, Any]) -> Callable[[Route], None]:
    """Answer a request for the event stream with these jobs, then end it."""
    body = "".join(f"data: {json.dumps({**JOB, **job})}\n\n" for job in jobs)
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def telling(*jobs: dict[str, Any]) -> Callable[[Page], object]:
    """Prepare a page on which every event stream is these jobs."""
    return lambda page: page.route("**/v1/jobs", told(*jobs))


def with_defaults(defaults: dict[str, Any] | None, **more: Any) -> Callable[[Route], None]:
    """Answer a request for the models with these defaults, or with none."""

    def fulfill(route: Route) -> None:
        models = route.fetch().json()
        models["data"][0].pop("defaults", None)
        models["data"][0].update(more if defaults is None else {"defaults": defaults, **more})
        route.fulfill(json=models)

    return fulfill


def ask(page: Page, **fields: str) -> None:
    """Fill inputs by their labels, and submit."""
    for name, value in fields.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Generate").click()
