"""The page at / in a real browser, over stub ranks."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect
from serving.stub_ranks import PREVIEW, StubRanks, served

from halovae.pipelines import tiny

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan2.1", "qwen-image-edit"):
        tiny.make_model(name, folder / name)
    return folder


@contextmanager
def page_of(browser: Browser, url: str, viewport: Any = DESKTOP) -> Iterator[Page]:
    """Open the page, and check that it calls only its own server and that its script raises no error."""
    context = browser.new_context(viewport=viewport, has_touch=viewport is PHONE, is_mobile=viewport is PHONE)
    page = context.new_page()
    called: list[str] = []
    logged: list[str] = []
    page.on("request", lambda request: called.append(request.url))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert all(address.startswith((url, f"blob:{url}", "data:")) for address in called), called
    assert logged == []


def plays(page: Page) -> dict[str, float]:
    """Play the first video for a moment, and return its size and length."""
    video: dict[str, float] = page.locator("video").first.evaluate(
        """async video => {
            await video.play();
            return { width: video.videoWidth, height: video.videoHeight, seconds: video.duration };
        }"""
    )
    return video


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_video_is_asked_for_followed_played_and_deleted(
    browser: Browser, home: Path, tmp_path: Path, viewport: dict[str, int]
) -> None:
    with served(home / "wan2.1", tmp_path) as (url, stub), page_of(browser, url, viewport) as page:
        assert isinstance(stub, StubRanks)
        stub.held.set()
        expect(page.locator("header")).to_contain_text("tiny")
        for absent in ("Picture", "Key"):
            expect(page.get_by_label(absent)).to_be_hidden()
        page.get_by_label("Prompt").fill("<b>bold</b> 猫 " + "long" * 100)
        page.get_by_label("Size").fill("70x50")
        page.get_by_label("Frames").fill("4")
        page.get_by_label("Steps").fill("4")
        page.get_by_role("button", name="Generate").click()
        card = page.locator("article")
        expect(card.locator("strong")).to_have_text("Making: 20 %")
        expect(card.locator("progress")).to_be_visible()
        assert stub.seen[-1]["preview_every"] == 5
        stub.channel.send("preview", stub.seen[-1]["attempt"], step=1, picture=base64.b64encode(PREVIEW).decode())
        expect(card.get_by_alt_text("preview")).to_have_js_property("naturalWidth", 24)
        stub.held.clear()
        expect(card.locator("strong")).to_have_text("Done")
        expect(card.locator("progress")).to_be_hidden()
        expect(card.get_by_alt_text("preview")).to_have_count(0)
        expect(card.locator("p")).to_contain_text("<b>bold</b> 猫 long")  # as text
        card.scroll_into_view_if_needed()
        expect(card.locator("video")).to_have_js_property("readyState", 4)
        assert plays(page) == {"width": 64, "height": 48, "seconds": 5 / 16}
        for fact in ("64x48, 5 frames", "size from 70x50", "num_frames from 4", "2x1: the fastest", "0.5 s",
                     "100 MiB of maps per device", "predicted 0.8 s, 2.00 times this plan's, and 200 MiB"):  # fmt: skip
            expect(card.locator("dl")).to_contain_text(fact)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        card.get_by_role("button", name="Delete").click()
        expect(card).to_have_count(0)
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_jobs_of_other_clients_appear_and_a_failure_shows_its_reason(
    browser: Browser, home: Path, tmp_path: Path
) -> None:
    with served(home / "wan2.1", tmp_path) as (url, stub), page_of(browser, url) as page:
        assert isinstance(stub, StubRanks)
        expect(page.locator("#none")).to_be_visible()
        stub.fails = True
        httpx.post(f"{url}/v1/videos", json={"prompt": "another's", "size": "64x48", "num_frames": 5})
        card = page.locator("article")
        expect(card.locator("strong")).to_have_text("Failed")
        expect(card.get_by_role("alert")).to_have_text("no plan fits (out_of_memory)")
        page.get_by_label("Prompt").fill("a cat")
        page.get_by_label("Size").fill("99999x99999")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#error")).to_contain_text("size")
        expect(card).to_have_count(1)


def test_a_picture_is_edited_once_the_key_is_given(browser: Browser, home: Path, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "png")
    with (
        served(home / "qwen-image-edit", tmp_path, api_key="secret") as (url, _),
        page_of(browser, url) as page,
    ):
        expect(page.locator("#state")).to_contain_text("key")
        page.get_by_label("Key").fill("secret")
        expect(page.locator("header")).to_contain_text("tiny")
        expect(page.get_by_label("Frames")).to_be_hidden()
        page.get_by_label("Prompt").fill("make it blue")
        page.get_by_label("Size").fill("64x48")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("article")).to_have_count(0)  # the browser asks for a picture first
        given: FilePayload = {"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()}
        page.get_by_label("Picture").set_input_files(given)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("article strong")).to_have_text("Done")
        expect(page.locator("article img")).to_have_js_property("naturalWidth", 64)


def test_the_page_says_that_ranks_are_starting_or_the_server_is_gone(
    browser: Browser, home: Path, tmp_path: Path
) -> None:
    context = browser.new_context()
    page = context.new_page()
    with served(home / "wan2.1", tmp_path, stub=False) as (url, _):
        page.goto(url)
        expect(page.locator("#state")).to_have_text("the ranks are starting")
    expect(page.locator("#state")).to_contain_text("not connected")
    context.close()
