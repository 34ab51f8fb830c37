"""`halovae serve` with real ranks: its results, and its behavior when ranks, fronts, and disks fail."""

import base64
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import psutil
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect
from serving.server import Server

from halovae.io import media
from halovae.pipelines import tiny
from halovae.pipelines.generator import Generator
from halovae.pipelines.specs import Prompt
from halovae.serving.jobs import TRIES
from halovae.serving.table import JobTable

LONG = {"num_inference_steps": 1000}


@pytest.fixture(scope="module")
def server(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of Wan2.1 on two ranks."""
    with Server(models("wan2.1"), tmp_path_factory.mktemp("server") / "out") as running:
        yield running.wait()


def frames_of(content: bytes) -> list[Any]:
    with av.open(io.BytesIO(content), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def content(server: Server, video: str) -> bytes:
    return httpx.get(f"{server.url}/v1/videos/{video}/content", timeout=30).content


def picture() -> tuple[str, bytes, str]:
    """Return a picture file to start from."""
    file = io.BytesIO()
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).save(file, "png")
    return "given.png", file.getvalue(), "image/png"


def made_by_openai(server: Server, extra: dict[str, Any], **given: Any) -> Any:
    """Make a video with OpenAI's client, and wait for it."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    body = {"num_inference_steps": 2, "num_frames": 5, "size": "64x48", **extra}
    return client.videos.create_and_poll(prompt="a cat", extra_body=body, **given)


def started(server: Server, video: str) -> dict[str, Any]:
    while (shown := server.video(video))["progress"] == 0:
        assert shown["status"] in ("queued", "in_progress"), shown
        time.sleep(0.01)
    return shown


def test_curl_gets_a_video_that_plays(server: Server) -> None:
    body = {
        "prompt": "A calico cat playing a piano on stage",
        "size": "80x48",
        "num_inference_steps": 2,
        "num_frames": 16,
    }
    words = ["-H", "Content-Type: application/json", "-H", "Authorization: Empty", "-d", json.dumps(body)]
    done = subprocess.run(
        ["curl", "-sS", "-X", "POST", f"{server.url}/v1/videos", *words], capture_output=True, check=True
    )
    shown = server.ended(json.loads(done.stdout)["id"])
    assert shown["status"] == "completed", shown
    assert (shown["size"], shown["num_frames"], shown["adjusted"]) == ("80x48", 17, {"num_frames": 16})
    assert shown["decode"]["peak_memory_mb"] > shown["decode"]["peak_allocated_mb"] > 0
    assert shown["decode"]["one_device"]["peak_allocated_mb"] > 0
    frames = frames_of(content(server, shown["id"]))
    assert [frame.shape for frame in frames] == [(48, 80, 3)] * 17


def test_openais_client_makes_fetches_lists_and_deletes_a_video(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").videos
    extra = {"num_frames": 5, "num_inference_steps": 2}
    made = client.create_and_poll(prompt="a cat", size="64x48", extra_body=extra, poll_interval_ms=100)  # type: ignore[arg-type]
    assert made.status == "completed"
    assert len(frames_of(client.download_content(made.id).content)) == 5
    assert next(iter(client.list(limit=1))).id == made.id
    assert client.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.retrieve(made.id)


def test_previews_are_drawn_while_steps_run(server: Server) -> None:
    video = server.submit(preview_every=2, **LONG)
    while (shown := server.video(video))["preview"] is None:
        assert shown["status"] in ("queued", "in_progress"), shown
        time.sleep(0.02)
    with Image.open(io.BytesIO(httpx.get(server.url + shown["preview"], timeout=30).content)) as drawn:
        assert (drawn.format, drawn.size) == ("JPEG", (64, 48))
    httpx.delete(f"{server.url}/v1/videos/{video}", timeout=30)


def test_the_server_makes_what_one_rank_generates(
    server: Server, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Several results, decoded together, match the frames that one rank generates with the same seeds.

    Each served mp4 file is as close to these frames as an mp4 file made directly from them. The two files may differ by
    more: where one value in a thousand differs by 1, x264 decides differently, and the mean difference is 1.3.
    """
    shown = server.ended(server.submit(n=2, seed=11))
    generator = Generator(models("wan2.1"), torch.float32, torch.float32)
    for index in range(2):
        prompt = generator.kind.fitted(Prompt("a cat", (64, 48), 5, 2, seed=11 + index))
        made = generator.decoder.decode(generator.denoise(prompt), dtype=torch.uint8, denormalize=True)
        assert made is not None
        sink = media.Sink(tmp_path / "one.mp4", 16)
        sink.write(made[0])
        sink.close(whole=True)
        served = httpx.get(f"{server.url}/v1/videos/{shown['id']}/content?index={index}", timeout=30).content
        direct = frames_of((tmp_path / "one.mp4").read_bytes())
        for actual, expected, frame in zip(frames_of(served), direct, made[0].unbind(1), strict=True):
            exact = frame.permute(1, 2, 0).int().numpy()
            assert abs(actual - exact).mean() < abs(expected - exact).mean() + 0.1


def test_the_page_shows_what_was_made(server: Server, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(server.url)
    page.get_by_label("Prompt").fill("A calico cat playing a piano on stage")
    page.get_by_label("Size").fill("416x240")
    page.get_by_label("Frames").fill("16")
    page.get_by_label("Steps").fill("4")
    page.get_by_role("button", name="Generate").click()
    card = page.locator("article").first
    expect(card).to_contain_text("416x240, 17 frames")
    expect(card).to_have_attribute("data-status", "completed", timeout=60_000)
    card.get_by_role("button", name="Play").click()
    expect(card.locator("video")).to_have_js_property("readyState", 4)
    for fact in ("Plan", "maps per device", "One device"):
        expect(card.locator("dl")).to_contain_text(fact)
    page.close()


def test_a_running_job_is_deleted_within_a_step(server: Server) -> None:
    long = server.submit(**LONG)
    started(server, long)
    assert httpx.delete(f"{server.url}/v1/videos/{long}").json()["deleted"]
    short = server.ended(server.submit())
    assert short["status"] == "completed"
    assert short["completed_at"] - short["created_at"] < 10  # the job of 1000 steps no longer runs


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_all_and_its_job_is_tried_again(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """The rank fails because its address space is limited."""
    with Server(models("wan2.1"), tmp_path / "out") as server:
        before = server.wait().ranks()
        all_it_has = before[1].memory_info().vms
        before[1].rlimit(psutil.RLIMIT_AS, (all_it_has, all_it_has))
        shown = server.ended(server.submit(size="256x256", num_frames=17))
        assert shown["status"] == "completed", shown
        assert not set(server.ranks()) & set(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1", "wan2.1-i2v"])  # without and with an input picture
def test_a_server_serves_once_it_is_warm(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    with Server(models(name), tmp_path / "out", "--warmup", "64x48x5") as server:
        server.wait()
        given = {} if name == "wan2.1" else {"input_reference": picture()}
        assert made_by_openai(server, {}, **given).status == "completed"


@pytest.mark.slow
def test_a_job_that_all_ranks_refuse_fails_and_they_go_on(models: Callable[[str], Path], tmp_path: Path) -> None:
    with Server(models("wan2.1"), tmp_path / "out", "--memory-budget", "64KiB") as server:
        before = server.wait().ranks()
        for _ in range(2):
            failed = server.ended(server.submit())
            assert failed["error"]["code"] == "out_of_memory"
            assert "budget" in failed["error"]["message"]
        assert server.ranks() == before


def test_a_job_whose_ranks_are_killed_each_time_fails_and_the_next_one_is_made(server: Server) -> None:
    fatal, waiting = server.submit(**LONG), server.submit()
    for count in range(TRIES):
        while server.video(fatal)["progress"] == 0:
            time.sleep(0.01)
        before = server.ranks()
        assert len(before) == 2
        before[count % 2].kill()
        while server.ranks() == before or server.video(fatal)["progress"] > 0:
            assert httpx.get(f"{server.url}/health").status_code in (200, 503)  # the front keeps answering
            time.sleep(0.05)
        assert not set(server.ranks()) & set(before)
    assert server.ended(fatal)["error"]["code"] == "interrupted"
    assert server.ended(waiting)["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_noticed_and_its_job_is_made(
    victim: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with Server(models("wan2.1"), tmp_path / "out", "--stall-timeout", "5") as server:
        video = server.wait().submit(num_inference_steps=300)
        started(server, video)
        before = server.ranks()
        before[victim].suspend()
        assert server.ended(video)["status"] == "completed"
        assert not psutil.wait_procs(before, timeout=10)[1]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [60, 1])
def test_a_server_that_is_asked_to_end_lets_its_job_end(
    patience: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with Server(models("wan2.1"), tmp_path / "out", "--drain-timeout", str(patience)) as server:
        video = server.wait().submit(num_inference_steps=300)
        started(server, video)
        assert server.stop(signal.SIGTERM) == 0
        assert "1 running job(s)" in server.log.read_text()
        kept = JobTable(server.output / "jobs.sqlite").get(video)
        assert kept is not None
        assert (kept.status, kept.interrupted) == ("completed" if patience > 1 else "queued", {})


def test_a_killed_front_ends_its_ranks_and_another_goes_on(server: Server, models: Callable[[str], Path]) -> None:
    """This must be the last test that uses `server`."""
    made = [server.submit(num_inference_steps=steps) for steps in (300, 2, 2)]
    started(server, made[0])
    processes = psutil.Process(server.process.pid).children(recursive=True)
    server.stop(signal.SIGKILL)
    assert not psutil.wait_procs(processes, timeout=10)[1]
    with Server(models("wan2.1"), server.output) as second:
        second.wait()
        assert [second.ended(video)["status"] for video in made] == ["completed"] * 3
        assert all(frames_of(content(second, video)) for video in made)
        assert second.stop() == 0


@pytest.mark.slow
def test_a_full_disk_fails_the_job_and_leaves_nothing(models: Callable[[str], Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        with Server(models("wan2.1"), disk, ranks=1) as server:
            server.wait()
            failed = server.ended(server.submit(size="256x256", num_frames=33, num_inference_steps=1))
            assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full"), failed
            assert not [*disk.rglob("*.mp4"), *disk.rglob(".*.partial")]
            assert server.ended(server.submit())["status"] == "completed"
            server.stop()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.2", "wan2.1-i2v", "qwen-image", "qwen-image-edit", "qwen-image-edit-plus"])
def test_the_other_models_are_served(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    with Server(models(name), tmp_path / "out") as server:
        server.wait()
        if name.startswith("wan"):
            if name == "wan2.2":
                video = made_by_openai(server, {"guidance_scale_2": 3})
            else:
                video = made_by_openai(server, {}, input_reference=picture())
            assert video.status == "completed", video.error
            assert [frame.shape for frame in frames_of(content(server, video.id))] == [(48, 64, 3)] * 5
            return
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").images
        fields: dict[str, Any] = {"prompt": "a cat", "size": "64x48", "extra_body": {"num_inference_steps": 2}}
        if name == "qwen-image":
            answer = client.generate(**fields)
        else:
            answer = client.edit(image=[picture()] * (2 if name.endswith("plus") else 1), **fields)
        assert answer.model_dump()["decode"]["peak_allocated_mb"] > 0
        png = base64.b64decode(answer.data[0].b64_json)
        assert Image.open(io.BytesIO(png)).size == (64, 48)


def test_a_server_that_cannot_start_says_why(models: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tiny.make_model("wan2.1", broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with Server(broken, tmp_path / "out", ranks=1) as server:
        assert server.process.wait(60) == 2
        assert "the ranks ended before they were ready" in " ".join(server.log.read_text().split())
    words = [
        "serve",
        "--model-path",
        str(models("wan2.1")),
        "--output-dir",
        str(tmp_path / "other"),
        "--sp-degree",
        "3",
    ]
    done = subprocess.run([sys.executable, "-m", "halovae.cli.main", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--sp-degree 3" in done.stderr
