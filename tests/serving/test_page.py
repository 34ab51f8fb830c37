"""The page at / in a real browser, over stub ranks: what people do with it."""

import base64
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect
from serving.browsing import DESKTOP, PHONE, ask, page_of, stubbed, told
from serving.clients import finished, submitted
from serving.stub_ranks import PREVIEW, served

from halovae.pipelines import tiny


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
    browser: Browser, model: Path, tmp_path: Path, viewport: dict[str, int]
) -> None:
    with stubbed(model, tmp_path) as (url, stub), page_of(browser, url, viewport) as page:
        stub.held.set()
        expect(page.locator("header")).to_contain_text("tiny")
        for absent in ("Picture", "Key"):
            expect(page.get_by_label(absent)).to_be_hidden()
        ask(page, Prompt="<b>bold</b> 猫 " + "long" * 100, Size="70x50", Frames="4", Steps="4")
        card = page.locator("article")
        expect(card.locator(".detail")).to_contain_text("20 %")
        expect(card.locator("progress")).to_have_js_property("value", 20)
        assert stub.seen[-1]["preview_every"] == 5
        stub.channel.send("preview", stub.seen[-1]["attempt"], step=1, picture=base64.b64encode(PREVIEW).decode())
        expect(card.get_by_alt_text("preview")).to_have_js_property("naturalWidth", 24)
        stub.held.clear()
        expect(card.locator("strong")).to_have_text("Done")
        expect(card.locator("progress")).to_be_hidden()
        expect(card.get_by_alt_text("preview")).to_have_count(0)
        expect(card.locator("p").first).to_contain_text("<b>bold</b> 猫 long")  # as text
        card.scroll_into_view_if_needed()
        expect(card.locator("img")).to_have_js_property("naturalWidth", 64)
        expect(card.locator("video")).to_have_count(0)
        card.get_by_role("button", name="Play").click()
        expect(card.locator("video")).to_have_js_property("readyState", 4)
        expect(card.locator("video")).to_be_focused()
        assert "variant=thumbnail" in (card.locator("video").get_attribute("poster") or "")
        assert plays(page) == {"width": 64, "height": 48, "seconds": 5 / 16}
        for fact in ("64x48, 5 frames", "size from 70x50", "num_frames from 4", "2x1: the fastest", "0.5 s",
                     "100 MiB of maps per device", "predicted 0.8 s, 2.00 times this plan's, and 200 MiB"):  # fmt: skip
            expect(card.locator("dl")).to_contain_text(fact)
        with page.expect_download() as download:
            card.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename.endswith(".mp4")
        assert download.value.path().read_bytes() == next(tmp_path.rglob("*.mp4")).read_bytes()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        card.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(card).to_have_count(0)
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_jobs_of_other_clients_appear_and_a_failure_shows_its_reason(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    with stubbed(model, tmp_path) as (url, stub), page_of(browser, url) as page:
        expect(page.locator("#none")).to_be_visible()
        stub.fails = True
        submitted(url, prompt="another's")
        card = page.locator("article")
        expect(card.locator("strong")).to_have_text("Failed")
        expect(card.locator(".failure")).to_have_text("no plan fits (out_of_memory)")
        card.get_by_role("button", name="Delete").click()  # nothing is lost: at once
        expect(card).to_have_count(0)
        expect(page.locator("#none")).to_be_visible()


def test_an_error_is_shown_at_its_field_and_any_other_in_the_alert(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    with stubbed(model, tmp_path) as (url, _), page_of(browser, url) as page:
        size = page.get_by_label("Size")
        for given, message in (("99999x99999", "size: "), ("large", "Expected WIDTHxHEIGHT, such as 832x480.")):
            ask(page, Prompt="a cat", Size=given)
            expect(page.locator("#size-wrong")).to_contain_text(message)
            expect(size).to_be_focused()
            expect(size).to_have_attribute("aria-invalid", "true")
            assert "size-wrong" in (size.get_attribute("aria-describedby") or "")
            size.fill("64x48")
            expect(page.locator("#size-wrong")).to_be_empty()
            assert size.get_attribute("aria-invalid") is None
        full = {"error": {"message": "500 jobs are already waiting", "param": None, "code": "queue_full"}}
        page.route("**/v1/videos", lambda route: route.fulfill(status=429, json=full))
        ask(page, Prompt="a cat", Frames="5")
        expect(page.locator("#error")).to_have_text("500 jobs are already waiting")
        ask(page, Prompt="")
        expect(page.locator("#error")).to_be_empty()
        expect(page.get_by_label("Prompt")).to_be_focused()
        expect(page.locator("article")).to_have_count(0)
        page.unroute("**/v1/videos")
        page.route("**/v1/videos/*", lambda route: route.fulfill(status=503, json={"error": {"message": "locked"}}))
        ask(page, Prompt="a cat", Steps="2")
        expect(page.locator("article strong")).to_have_text("Done")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator("article").get_by_role("alert")).to_have_text("locked")


def test_a_picture_is_edited_once_the_key_is_given(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "png")
    folder = tmp_path_factory.mktemp("models") / "qwen-image-edit"
    tiny.make_model("qwen-image-edit", folder)
    with stubbed(folder, tmp_path, api_key="secret") as (url, stub), page_of(browser, url) as page:
        expect(page.locator("#state")).to_contain_text("key")
        page.get_by_label("Key").fill("secret")
        expect(page.locator("header")).to_contain_text("tiny")
        for absent in ("Frames", "FPS"):
            expect(page.get_by_label(absent)).to_be_hidden()
        ask(page, Prompt="make it blue", Size="64x48")
        expect(page.get_by_label("Picture")).to_be_focused()  # it is required
        expect(page.locator("article")).to_have_count(0)
        given: FilePayload = {"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()}
        page.get_by_label("Picture").set_input_files(given)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("article strong")).to_have_text("Done")
        expect(page.locator("article img")).to_have_js_property("naturalWidth", 64)
        (tmp_path / "picture.png").write_bytes(picture.getvalue())
        command = copied(page)
        assert command.startswith("# The job has an input picture")
        assert "secret" not in command
        repeated(command, tmp_path, HALOVAE_API_KEY="secret")
        assert stub.seen[-1]["prompt"] == {**stub.seen[-2]["prompt"], "images": stub.seen[-1]["prompt"]["images"]}


def copied(page: Page) -> str:
    """Press the button, and return what is in the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as curl").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def repeated(command: str, folder: Path, **variables: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert "error" not in json.loads(done.stdout) or json.loads(done.stdout)["error"] is None, done.stdout


def test_the_copied_command_repeats_the_request_in_a_shell(browser: Browser, model: Path, tmp_path: Path) -> None:
    prompt = """it's "$HOME" `id` \\ @é\n<b>"""
    with stubbed(model, tmp_path) as (url, stub), page_of(browser, url) as page:
        ask(page, Prompt=prompt, Size="64x48", Frames="5", Steps="3", FPS="8", Avoid="'blur'", Seed=str(2**63 - 1))
        expect(page.locator("article strong")).to_have_text("Done")
        command = copied(page)
        repeated(command, tmp_path)
        assert stub.seen[-1]["prompt"]["text"] == prompt
        assert {**stub.seen[0], **dict.fromkeys(("attempt", "paths", "preview_every"))} == {
            **stub.seen[-1], **dict.fromkeys(("attempt", "paths", "preview_every"))
        }  # fmt: skip
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as over plain HTTP
        page.locator("article").last.get_by_role("button", name="Cop").click()
        expect(page.locator("article textarea")).to_have_value(command)
        expect(page.locator("article textarea")).to_be_focused()
        page.reload()  # the page no longer knows what it sent
        assert copied(page).startswith("# Add the negative prompt and the guidance")


def test_a_key_reaches_media_by_header_only(browser: Browser, model: Path, tmp_path: Path) -> None:
    requests: list[Any] = []

    def prepare(page: Page) -> None:
        page.on("request", lambda request: requests.append(request))
        page.add_init_script(
            """window.held = [];
            const { createObjectURL, revokeObjectURL } = URL;
            URL.createObjectURL = blob => { window.held.push(createObjectURL(blob)); return window.held.at(-1); };
            URL.revokeObjectURL = address => {
                window.held = window.held.filter(other => other !== address);
                revokeObjectURL(address);
            };"""
        )

    with (
        stubbed(model, tmp_path, api_key="secret") as (url, _),
        page_of(browser, url, prepare=prepare) as page,
    ):
        page.get_by_label("Key").fill("wrong")
        expect(page.locator("#key-wrong")).to_contain_text("key")
        page.get_by_label("Key").fill("secret")
        ask(page, Prompt="a cat", Size="64x48", Frames="5")
        card = page.locator("article")
        expect(card.locator("img")).to_have_js_property("naturalWidth", 64)
        card.get_by_role("button", name="Play").click()
        expect(card.locator("video")).to_have_js_property("readyState", 4)
        addresses = card.locator("video").evaluate("video => [video.src, video.poster]")
        assert {*addresses} <= {*page.evaluate("window.held")}
        with page.expect_download():
            card.get_by_role("button", name="Download").click()
        assert "$HALOVAE_API_KEY" in copied(page)
        card.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(card).to_have_count(0)
        assert page.evaluate("window.held") == []  # all are revoked
        assert not any("secret" in request.url for request in requests)
        content = [request for request in requests if request.url.startswith(url) and "/content" in request.url]
        assert len(content) == 3
        assert all(request.headers["authorization"] == "Bearer secret" for request in content)


def test_all_is_done_by_keyboard_and_only_beginnings_and_ends_are_announced(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    with stubbed(model, tmp_path) as (url, stub), page_of(browser, url, reduced_motion="reduce") as page:
        stub.held.set()
        page.evaluate(
            """() => {
                window.said = [];
                const said = document.getElementById("said");
                new MutationObserver(() => window.said.push(said.textContent)).observe(said, { childList: true });
            }"""
        )
        focused = page.locator(":focus")

        def tab_to(name: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                if focused.count() and name in (focused.get_attribute("aria-label"), focused.inner_text()):
                    outline = "node => getComputedStyle(node).outlineWidth"
                    assert focused.evaluate(outline) == "3px"
                    return
            raise AssertionError(f"{name} is not reached")

        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        page.get_by_label("Prompt").focus()
        page.keyboard.type("a cat")
        page.keyboard.press("Control+Enter")
        expect(page.locator("article .detail")).to_contain_text("%")
        stub.channel.send("progress", stub.seen[-1]["attempt"], stage="denoising", done=25)
        expect(page.locator("article .detail")).to_contain_text("40 %")
        stub.held.clear()
        expect(page.locator("article strong")).to_have_text("Done")
        tab_to("Play")
        page.keyboard.press("Enter")
        expect(page.locator("video")).to_be_focused()
        assert not page.locator("video").evaluate("video => video.loop")
        tab_to("Delete")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Keep")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("article").get_by_role("button", name="Delete")).to_be_focused()
        page.keyboard.press("Enter")
        tab_to("Delete")
        page.keyboard.press("Enter")
        expect(page.locator("article")).to_have_count(0)
        expect(page.get_by_role("heading", name="Jobs")).to_be_focused()
        assert page.evaluate("window.said") == ["Submitted.", "Done: a cat", "Deleted: a cat"]


def test_a_running_job_is_cancelled_without_a_question(browser: Browser, model: Path, tmp_path: Path) -> None:
    with stubbed(model, tmp_path) as (url, stub), page_of(browser, url) as page:
        stub.held.set()
        submitted(url)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("article")).to_have_count(0)
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_thumbnails_are_fetched_when_they_are_scrolled_to(browser: Browser, model: Path, tmp_path: Path) -> None:
    fetched: list[str] = []
    with stubbed(model, tmp_path) as (url, _):
        for _ in range(10):
            finished(url, submitted(url, n=2))
        with page_of(
            browser, url, PHONE, lambda page: page.on("request", lambda request: fetched.append(request.url))
        ) as page:
            cards = page.locator("article")
            expect(cards).to_have_count(10)
            expect(cards.get_by_role("button", name="Download 2")).to_have_count(10)
            cards.first.scroll_into_view_if_needed()
            expect(cards.first.locator("img").last).to_have_js_property("naturalWidth", 64)
            assert 2 <= sum("thumbnail" in address for address in fetched) < 20
            cards.last.scroll_into_view_if_needed()
            expect(cards.last.locator("img").last).to_have_js_property("naturalWidth", 64)
            assert all("thumbnail" in address for address in fetched if "/content" in address)


def test_a_broken_stream_is_opened_again_and_jobs_deleted_meanwhile_go(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    def prepare(page: Page) -> None:
        page.clock.install()
        page.route("**/v1/jobs", lambda route: told({"id": "video_gone"})(route), times=1)

    with stubbed(model, tmp_path) as (url, _), page_of(browser, url, prepare=prepare) as page:
        expect(page.locator("article")).to_have_count(1)
        expect(page.locator("#state")).to_have_text("not connected: the connection was lost; trying again")
        page.clock.run_for(2000)
        expect(page.locator("#state")).to_have_text("ready")
        submitted(url)
        expect(page.locator("article strong").first).to_have_text("Done")
        page.clock.run_for(5000)
        expect(page.locator("article")).to_have_count(1)
        expect(page.locator("article")).to_have_attribute("data-status", "completed")


def test_the_page_works_behind_a_proxys_prefix(browser: Browser, model: Path, tmp_path: Path) -> None:
    def prepare(page: Page) -> None:
        page.route("**/halovae/**", lambda route: route.continue_(url=route.request.url.replace("/halovae/", "/")))
        page.route(re.compile(r":\d+/(?!halovae/)"), lambda route: route.abort())

    with stubbed(model, tmp_path) as (url, _), page_of(browser, f"{url}/halovae/", prepare=prepare) as page:
        ask(page, Prompt="a cat", Size="64x48", Frames="5")
        card = page.locator("article")
        expect(card.locator("img")).to_have_js_property("naturalWidth", 64)
        card.get_by_role("button", name="Play").click()
        expect(card.locator("video")).to_have_js_property("readyState", 4)
        assert f"'{url}/halovae/v1/videos'" in copied(page)


def test_a_silent_stream_is_given_up(browser: Browser, model: Path, tmp_path: Path) -> None:
    def prepare(page: Page) -> None:
        page.clock.install()
        page.route("**/v1/jobs", lambda route: None, times=1)  # never answered

    with stubbed(model, tmp_path) as (url, _), page_of(browser, url, prepare=prepare) as page:
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        page.clock.run_for(41_000)
        expect(page.locator("#state")).to_contain_text("not connected: the server is silent")
        page.clock.run_for(2000)
        expect(page.locator("#state")).to_have_text("ready")


def test_the_page_says_that_ranks_are_starting_or_the_server_is_gone(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    context = browser.new_context()
    page = context.new_page()
    with served(model, tmp_path, stub=False) as (url, _):
        page.goto(url)
        expect(page.locator("#state")).to_have_text("the ranks are starting")
    expect(page.locator("#state")).to_contain_text("not connected")
    context.close()
