"""The page at / in a real browser: how it looks in states that these tests make up."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect
from serving.browsing import DEFAULTS, DESKTOP, NARROW, PHONE, ask, page_of, stubbed, telling, told, with_defaults
from serving.stub_ranks import DECODE

CONTRASTS = """() => {
    const channels = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => channels(color).slice(0, 3).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = node => {
        const color = getComputedStyle(node).backgroundColor;
        return channels(color)[3] === 0 ? ground(node.parentElement) : color;
    };
    return [...document.querySelectorAll("h1, p, span, label, input, button, strong, dt, dd, figcaption")]
        .filter(node => node.checkVisibility() && !node.disabled && (node.value || node.textContent)).map(node => {
            const [low, high] = [getComputedStyle(node).color, ground(node)].map(luminance).sort((a, b) => a - b);
            return [(high + 0.05) / (low + 0.05), node.outerHTML.slice(0, 80)];
        });
}"""


def test_the_step_and_the_time_left_are_shown_with_and_without_the_servers_word(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    with stubbed(model, tmp_path) as (url, _):
        known = {"stage": "denoising", "step": 12, "steps": 50, "eta_seconds": 200.0}
        for events, status, detail in (
            ([known], "Denoising", "step 12 of 50, 20 %, about 3 min left"),
            ([{**known, "stage": "decoding", "step": None, "eta_seconds": None}], "Decoding", "20 %"),
            ([{**known, "stage": "waiting", "step": None, "eta_seconds": 2.0}], "Waiting", "20 %, a few seconds left"),
            ([{}], "Running", "20 %"),
            ([{"status": "queued"}], "Waiting", "in the queue"),
        ):
            with page_of(browser, url, prepare=telling(*events)) as page:
                expect(page.locator("article strong")).to_have_text(status)
                expect(page.locator("article .detail")).to_have_text(detail)


def test_the_time_left_is_estimated_from_events(browser: Browser, model: Path, tmp_path: Path) -> None:
    progress = iter([20])

    def one_more(route: Route) -> None:
        told({"progress": next(progress, 40)})(route)

    def prepare(page: Page) -> None:
        page.clock.install()
        page.route("**/v1/jobs", one_more)

    with stubbed(model, tmp_path) as (url, _), page_of(browser, url, prepare=prepare) as page:
        expect(page.locator("article .detail")).to_have_text("20 %")
        page.clock.fast_forward(200_000)
        expect(page.locator("article .detail")).to_contain_text("40 %, about ")
        expect(page.locator("article .detail")).to_contain_text(" min left")


def test_the_models_defaults_are_in_the_inputs_and_stay_out_where_unknown(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    labels = {"Size": "832x480", "Frames": "81", "FPS": "16", "Steps": "50"}
    with stubbed(model, tmp_path) as (url, _):
        with page_of(browser, url, prepare=lambda page: page.route("**/v1/models", with_defaults(DEFAULTS))) as page:
            for label, value in labels.items():
                expect(page.get_by_label(label)).to_have_value(value)
            expect(page.locator("#num_frames-hint")).to_have_text("5.1 s of video.")
        with page_of(browser, url, prepare=lambda page: page.route("**/v1/models", with_defaults(None))) as page:
            expect(page.locator("#size-hint")).to_have_text("Empty: the model's own. Multiples of 16.")
            for label in labels:
                expect(page.get_by_label(label)).to_have_value("")
            expect(page.locator("#num_frames-hint")).to_have_text("Empty: the model's own.")


@pytest.mark.parametrize(
    ("grid", "ranks", "words"),
    [
        ("2x1", "01", "Plan 2x1. row 1: rank 0; row 2: rank 1."),
        ("2x2", "0123", "Plan 2x2. row 1: ranks 0, 1; row 2: ranks 2, 3."),
        ("2x1x2", "0123", "Plan 2x1x2. group 1 of results, row 1: ranks 0, 1; group 2 of results, row 1: ranks 2, 3."),
    ],
)
def test_the_plan_is_drawn_with_each_ranks_shard(
    browser: Browser, model: Path, tmp_path: Path, grid: str, ranks: str, words: str
) -> None:
    job = {"status": "completed", "progress": 100, "inference_time_s": 1.0, "decode": {**DECODE, "plan": grid}}
    with (
        stubbed(model, tmp_path) as (url, _),
        page_of(browser, url, prepare=telling(job)) as page,
    ):
        drawing = page.get_by_role("img", name=words)
        expect(drawing.locator("text")).to_have_text([*ranks])
        boxes: list[Any] = [cell.bounding_box() for cell in drawing.locator("rect").all()]
        places = sorted((box["y"], box["x"]) for box in boxes)
        batch, rows, cols = ([1] * 3 + [int(extent) for extent in grid.split("x")])[-3:]
        assert len(boxes) == batch * rows * cols == len(ranks)
        assert places == [(box["y"], box["x"]) for box in boxes] or batch > 1
        # Together, the cells of one group have the result's shape.
        ratio = boxes[0]["width"] * cols / (boxes[0]["height"] * rows)
        assert ratio == pytest.approx(832 / 480, rel=0.05)


def test_text_of_clients_never_becomes_elements(browser: Browser, model: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    decode = {**DECODE, "plan": evil, "why": evil, "fell_back": evil}
    jobs = (
        {"prompt": evil, "adjusted": {evil: evil}, "decode": decode, "status": "completed", "model": evil},
        {"id": "video_2", "prompt": evil, "status": "failed", "error": {"code": evil, "message": evil}},
    )
    with (
        stubbed(model, tmp_path) as (url, _),
        page_of(browser, url, prepare=telling(*jobs)) as page,
    ):
        expect(page.locator("article .failure")).to_have_text(["", f"{evil} ({evil})"][::-1])
        page.get_by_role("button", name="Delete").last.click()
        expect(page.get_by_role("dialog")).to_contain_text(evil)
        expect(page.locator("img[src=x], article script")).to_have_count(0)
        expect(page).to_have_title("halovae")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_fits_on_a_narrow_phone_with_large_targets_and_contrast(
    browser: Browser, model: Path, tmp_path: Path, scheme: str
) -> None:
    long = "long" * 100
    done = {"status": "completed", "progress": 100, "decode": {**DECODE, "plan": "8x8", "fell_back": long}}
    jobs = (
        {"prompt": long, "progress": 50, "stage": "denoising", "step": 12, "steps": 50, "eta_seconds": 40.0},
        {"id": "video_2", "prompt": long, "status": "failed", "error": {"code": "disk_full", "message": long}},
        {"id": "video_3", "prompt": long, "n": 4, **done},
    )
    with (
        stubbed(model, tmp_path) as (url, _),
        page_of(browser, url, NARROW, telling(*jobs), color_scheme=scheme) as page,
    ):
        expect(page.locator("article")).to_have_count(3)
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.get_by_role("button", name="Copy").first.click()
        ask(page, Prompt="a cat", Size="large")
        expect(page.locator("#size-wrong")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        for control in page.locator("button:visible, input:visible").all():
            box: Any = control.bounding_box()
            assert min(box["width"], box["height"]) >= 44, control.evaluate("node => node.outerHTML")
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert min(contrasts)[0] >= 4.5, min(contrasts)


@pytest.mark.skipif("HALOVAE_DRAW" not in os.environ, reason="draws docs/images/page*.png, with HALOVAE_DRAW=1")
def test_the_pictures_of_the_documentation_are_drawn(browser: Browser, model: Path, tmp_path: Path) -> None:
    """Jobs, figures, and thumbnails are made up."""
    images = Path(os.environ.get("HALOVAE_SCREENSHOTS", Path(__file__).parents[2] / "docs/images"))
    decode = {
        **DECODE, "seconds": 4.173, "plan": "2x2", "why": "the fastest that fits into memory",
        "peak_allocated_mb": 5406.2, "predicted": {"seconds": 4.02, "peak_allocated_mb": 5391.0},
        "one_device": {"seconds": 14.9, "peak_allocated_mb": 19215.0},
    }  # fmt: skip
    running = {"stage": "denoising", "step": 31, "steps": 50, "progress": 49, "eta_seconds": 84.0, "preview": "/drawn"}
    jobs = (
        {"prompt": "The sun sets behind mountains, mist in the valleys", "seed": 42, "status": "completed",
         "progress": 100, "inference_time_s": 221.84, "decode": decode},
        {"id": "video_2", "prompt": "The same mountains seen from a slowly turning camera", "seed": 97, **running},
        {"id": "video_3", "prompt": "A calico cat playing a piano on stage", "status": "queued", "progress": 0},
    )  # fmt: skip

    def prepare(page: Page) -> None:
        page.route("**/v1/models", with_defaults(DEFAULTS, id="Wan2.1-T2V-14B"))
        page.route("**/v1/jobs", told(*jobs), times=1)  # then the server's own stream, which is empty
        page.route("**/content?*thumbnail", lambda route: route.fulfill(body=scene("webp"), content_type="image/webp"))
        page.route("**/drawn", lambda route: route.fulfill(body=scene("jpeg", 52), content_type="image/jpeg"))

    with stubbed(model, tmp_path) as (url, _):
        for name, viewport in (("page", DESKTOP), ("page-phone", PHONE)):
            with page_of(browser, url, viewport, prepare) as page:
                if viewport is DESKTOP:
                    page.set_viewport_size({"width": 1280, "height": 1106})
                page.get_by_label("Prompt").fill("A red fox walks through fresh snow")
                page.get_by_label("Prompt").blur()
                expect(page.locator("#state")).to_have_text("ready")
                if viewport is PHONE:
                    page.locator("article").last.scroll_into_view_if_needed()
                    page.mouse.wheel(0, 2000)
                expect(page.locator("article").last.locator("img")).to_have_js_property("naturalWidth", 320)
                page.screenshot(path=images / f"{name}.png")
                expect(page.locator("article")).to_have_count(len(jobs))


def scene(kind: str, width: int = 320) -> bytes:
    """Return a picture of a sun behind mountains."""
    height = width * 15 // 26
    y, x = np.mgrid[:height, :width] / width
    picture = np.stack([240 - 90 * y, 150 - 120 * y + 40 * x, 120 + 80 * (0.5 - y)], -1)
    glow = np.hypot(x - 0.62, y - 0.24)
    picture += 90 * np.exp(-((glow / 0.2) ** 2))[..., None] * [1, 0.8, 0.4]
    picture[glow < 0.06] = 255, 236, 190
    for layer in range(4):
        ridge = 0.25 + 0.08 * layer + sum(
            0.06 / wave * np.sin(x * wave * 9 + 2.3 * layer * wave + wave) for wave in (1, 2, 5, 11)
        )  # fmt: skip
        picture[y > ridge] = np.array([120, 82, 110]) * (1 - layer / 5) + [0, 4, 14]
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, kind)
    return out.getvalue()
