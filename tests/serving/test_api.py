"""The HTTP API over stub ranks: OpenAI's client, bad requests, full queues, pictures of all kinds."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from serving.clients import SMALL, finished
from serving.stub_ranks import PREVIEW, StubRanks, served

from halovae.pipelines import tiny
from halovae.serving.jobs import TRIES, Cause, Job, JobSpec
from halovae.serving.table import opened

Server = tuple[str, StubRanks]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan2.1", "wan2.1-i2v", "qwen-image", "qwen-image-edit"):
        tiny.make_model(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def videos(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(home / "wan2.1", tmp_path_factory.mktemp("videos")) as (url, stub):
        assert stub is not None
        yield url, stub


@pytest.fixture(scope="module")
def edits(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(home / "qwen-image-edit", tmp_path_factory.mktemp("edits")) as (url, stub):
        assert stub is not None
        yield url, stub


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def picture(kind: str = "png", mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    out = io.BytesIO()
    color: Any = {"CMYK": (0, 255, 255, 0), "I;16": 0x8000}.get(mode, "red")
    Image.new(mode, size, color).save(out, kind, **options)
    return out.getvalue()


def test_openais_client_makes_lists_fetches_and_deletes_videos(videos: Server) -> None:
    api = client(videos[0])
    made = [
        api.videos.create_and_poll(
            prompt=f"a cat {index}", size="64x48", seconds="4", poll_interval_ms=20,  # type: ignore[arg-type]
            extra_body={"num_frames": 6, "num_inference_steps": 2, "seed": index},
        )
        for index in range(3)
    ]  # fmt: skip
    assert [one.status for one in made] == ["completed"] * 3
    assert (made[0].size, made[0].progress, made[0].seconds) == ("64x48", 100, "0.3125")
    extra = made[0].model_extra
    assert extra is not None
    assert (extra["num_frames"], extra["adjusted"]) == (5, {"num_frames": 6})
    assert extra["decode"]["plan"] == "2x1"
    pages = [one.id for one in api.videos.list(limit=2, order="asc")]
    assert pages[-3:] == [one.id for one in made]
    assert [one.id for one in api.videos.list(limit=1)][:3] == [one.id for one in reversed(made)]
    for variant, start in (("video", b"ftyp"), ("thumbnail", b"WEBP"), ("spritesheet", b"\xff\xd8")):
        content = api.videos.download_content(made[0].id, variant=variant).read()  # type: ignore[arg-type]
        assert start in content[:16]
    assert api.videos.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        api.videos.retrieve(made[0].id)
    assert gone.value.param == "video_id"


def test_a_running_video_has_previews(videos: Server) -> None:
    url, stub = videos
    stub.held.set()
    ids = [
        str(httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL, **given}).json()["id"])
        for given in ({"preview_every": 1}, {})
    ]
    deadline = time.monotonic() + 30
    while (shown := httpx.get(f"{url}/v1/videos/{ids[0]}").json())["preview"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert shown["preview"] == f"/v1/videos/{ids[0]}/preview?done=1"
    answer = httpx.get(url + shown["preview"])
    assert (answer.headers["content-type"], answer.content) == ("image/jpeg", PREVIEW)
    assert httpx.get(f"{url}/v1/images/{ids[0]}/preview").status_code == 404
    stub.held.clear()
    assert finished(url, ids[0])["preview"] is None
    assert finished(url, ids[1])["preview"] is None
    gone = httpx.get(url + shown["preview"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "no_preview")
    bad = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL, "preview_every": 0})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "preview_every")


def test_openais_client_edits_images(edits: Server) -> None:
    url, stub = edits
    edit: Any = client(url).images.edit  # its types allow only OpenAI's sizes
    answer = edit(image=("a.png", picture()), prompt="bluer", size="64x48", n=2, extra_body={"seed": 5})
    assert [Image.open(io.BytesIO(base64.b64decode(one.b64_json))).size for one in answer.data] == [(64, 48)] * 2
    assert stub.seen[-1]["prompt"]["seed"] == 5
    linked = edit(image=picture(), prompt="bluer", size="64x48", response_format="url")
    assert httpx.get(linked.data[0].url).content.startswith(b"\x89PNG")
    jpeg = edit(image=[picture()], prompt="bluer", size="64x48", output_format="jpeg")
    assert base64.b64decode(jpeg.data[0].b64_json).startswith(b"\xff\xd8")
    assert not list(Path(stub.seen[-1]["paths"][0]).parents[1].glob(".inputs/*"))


def test_openais_client_generates_images(home: Path, tmp_path: Path) -> None:
    with served(home / "qwen-image", tmp_path) as (url, _):
        generate: Any = client(url).images.generate
        assert generate(prompt="a cat", size="70x50", n=1).size == "64x48"
        with pytest.raises(openai.BadRequestError, match="POST /v1/images"):
            client(url).videos.create(prompt="a cat")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": "x" * 100_000}, "prompt", "32000"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": "a", "colour": 1}, "colour", "unknown field"),
        ({"prompt": "a", "num_frames": -1}, "num_frames", "greater"),
        ({"prompt": "a", "num_frames": 10**30}, "num_frames", "1025"),
        ({"prompt": "a", "num_frames": "many"}, "num_frames", "integer"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps", "greater"),
        ({"prompt": "a", "guidance_scale": 1e308}, "guidance_scale", "100"),
        ({"prompt": "a", "guidance_scale_2": 3}, "guidance_scale_2", "second transformer"),
        ({"prompt": "a", "seed": 2**70}, "seed", "less"),
        ({"prompt": "a", "size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "8x8"}, "size", "multiples of 16"),
        ({"prompt": "a", "size": "9999x9999"}, "size", "pixels"),
        ({"prompt": "a", "input_reference": "data:image/png;base64,AAAA"}, "input_reference", "picture"),
        ({"prompt": "a", "input_reference": "/etc/passwd"}, "input_reference", "data: URL"),
        ({"prompt": "a", "output_path": "/etc/cron.d/x"}, "output_path", "fetch them"),
        ({"prompt": "a", "reference_url": "http://example.com/a.png"}, "reference_url", "--allow-url-inputs"),
    ],
)
def test_bad_fields_are_named(body: dict[str, Any], param: str, words: str, videos: Server) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{videos[0]}/v1/videos", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes, videos: Server) -> None:
    answer = httpx.post(f"{videos[0]}/v1/videos", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_unicode_prompts_arrive_whole(videos: Server) -> None:
    url, stub = videos
    prompt = "钢琴上的猫 🐈\u202e" * 100
    made = httpx.post(f"{url}/v1/videos", json={"prompt": prompt, **SMALL}).json()
    assert finished(url, made["id"])["prompt"] == prompt
    assert stub.seen[-1]["prompt"]["text"] == prompt


@pytest.mark.parametrize(
    "data",
    [
        b"no picture",
        b"",
        picture()[:-30],
        picture("gif"),
        picture(size=(9000, 9000), mode="1"),
    ],
    ids=["text", "empty", "cut off", "gif", "bomb"],
)
def test_invalid_pictures_are_refused(data: bytes, edits: Server) -> None:
    answer = httpx.post(f"{edits[0]}/v1/images/edits", data={"prompt": "a"}, files={"image": data})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


@pytest.mark.parametrize(
    ("data", "size", "colour"),
    [
        (picture("jpeg", "CMYK"), (64, 48), (255, 0, 0)),
        (picture("png", "RGBA"), (64, 48), (255, 0, 0)),
        (picture("png", "LA"), (64, 48), (76, 76, 76)),
        (picture("png", "I;16"), (64, 48), (128, 128, 128)),
        (picture("jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"), (48, 64), (255, 0, 0)),
    ],
    ids=["CMYK", "alpha", "grey with alpha", "grey of 16 bits", "turned"],
)
def test_pictures_of_all_kinds_become_plain(
    data: bytes, size: tuple[int, int], colour: tuple[int, int, int], edits: Server
) -> None:
    url, stub = edits
    stub.held.set()
    with httpx.Client() as http:
        waiting = threading.Thread(
            target=http.post, args=(f"{url}/v1/images/edits",),
            kwargs={"data": {"prompt": "a", "size": "64x48"}, "files": {"image": data}, "timeout": 30},
        )  # fmt: skip
        before = len(stub.seen)
        waiting.start()
        while len(stub.seen) == before:
            time.sleep(0.01)
        with Image.open(stub.seen[-1]["prompt"]["images"][0]) as plain:
            assert (plain.mode, plain.size) == ("RGB", size)
            assert max(abs(a - b) for a, b in zip(plain.getpixel((5, 5)), colour, strict=True)) < 30  # type: ignore[arg-type]
        stub.held.clear()
        waiting.join()


def test_a_client_that_leaves_cancels_its_pictures(edits: Server) -> None:
    url, stub = edits
    stub.held.set()
    before = len(stub.seen)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": picture()}, timeout=0.5)
    while len(stub.seen) == before or stub.seen[-1]["attempt"] not in stub.channel.cancelled:
        time.sleep(0.01)
        if not stub.channel._known:
            break  # the stub was faster: it has already ended the attempt
    stub.held.clear()
    assert httpx.get(f"{url}/health").json()["jobs"]["queued"] == 0


def test_a_client_that_leaves_during_its_upload_leaves_nothing(videos: Server) -> None:
    url = httpx.URL(videos[0])
    before = httpx.get(f"{url}/metrics").text
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
        )
    assert httpx.get(f"{url}/health").status_code == 200
    submitted = [row for row in before.splitlines() if row.startswith("halovae_jobs_submitted_total")]
    assert submitted == [row for row in httpx.get(f"{url}/metrics").text.splitlines() if row in submitted]


def test_a_body_too_large_is_refused(videos: Server) -> None:
    large = b"{" + b" " * 2**20
    url, headers = f"{videos[0]}/v1/videos", {"content-type": "application/json"}
    assert httpx.post(url, content=large, headers=headers).status_code == 413
    chunked = httpx.post(url, content=(large[i : i + 4096] for i in range(0, len(large), 4096)), headers=headers)
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")


def test_a_full_queue_says_when_to_retry(home: Path, tmp_path: Path) -> None:
    with served(home / "wan2.1", tmp_path, stub=False, queue=2) as (url, _):
        answers = [httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}) for _ in range(3)]
        assert [one.status_code for one in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"].isdigit()
        assert answers[2].json()["error"]["code"] == "queue_full"
        assert httpx.get(f"{url}/health").status_code == 503  # no ranks
        assert httpx.delete(f"{url}/v1/videos/{answers[0].json()['id']}").json()["deleted"]
        assert httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}).status_code == 200


def test_queued_jobs_survive_the_front(home: Path, tmp_path: Path) -> None:
    with served(home / "wan2.1", tmp_path, stub=False) as (url, _):
        made = [httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}).json()["id"] for _ in range(3)]
    with served(home / "wan2.1", tmp_path) as (url, stub):
        assert [finished(url, one)["status"] for one in made] == ["completed"] * 3
        assert stub is not None
        assert len(stub.seen) == 3


@pytest.mark.parametrize(
    ("interrupted", "status", "code"),
    [
        ({}, "completed", None),
        ({"front": TRIES - 1}, "failed", "interrupted"),
        ({"ranks": TRIES - 1, "front": TRIES - 2}, "completed", None),  # each cause counts on its own
    ],
)
def test_a_job_that_was_running_is_tried_again(
    interrupted: dict[Cause, int], status: str, code: str | None, home: Path, tmp_path: Path
) -> None:
    jobs = opened(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", JobSpec("a", (64, 48), 5, 2, 0))
    jobs.add(job)
    jobs.update(job, status="in_progress", interrupted=interrupted)
    jobs.close()
    partial = tmp_path / "results" / f".{job.names()[0]}.partial"
    partial.parent.mkdir()
    partial.touch()
    with served(home / "wan2.1", tmp_path) as (url, _):
        done = finished(url, job.id)
        assert done["status"] == status
        assert (done["error"] or {}).get("code") == code
        assert not partial.exists()


def test_deleting_a_running_job_cancels_it(videos: Server) -> None:
    url, stub = videos
    stub.held.set()
    video = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}).json()["id"]
    while httpx.get(f"{url}/v1/videos/{video}").json()["progress"] == 0:
        time.sleep(0.01)
    attempt = stub.seen[-1]
    early = httpx.get(f"{url}/v1/videos/{video}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "video_not_ready")
    httpx.delete(f"{url}/v1/videos/{video}")
    while attempt["attempt"] in stub.channel._known:
        time.sleep(0.01)
    stub.held.clear()
    assert not Path(attempt["paths"][0]).exists()


def test_keys_are_asked_for(home: Path, tmp_path: Path) -> None:
    with served(home / "wan2.1", tmp_path, api_key="schlüssel") as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        right = {b"authorization": "Bearer schlüssel".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).json()["data"][0]["id"] == "tiny"
        assert httpx.get(f"{url}/health").status_code in (200, 503)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png", "http://localhost/a.png", "http://10.0.0.1/", "http://169.254.169.254/latest",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://2130706433/", "file:///etc/passwd",
        "ftp://example.com/", "http://",
    ],
)  # fmt: skip
def test_urls_never_reach_inside(url: str, home: Path, tmp_path: Path) -> None:
    with served(home / "wan2.1-i2v", tmp_path, allow_url_inputs=True) as (base, _):
        answer = httpx.post(f"{base}/v1/videos", json={"prompt": "a", "reference_url": url, **SMALL})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reference_url")
        assert "public" in answer.json()["error"]["message"] or "http" in answer.json()["error"]["message"]


def test_old_and_large_output_goes(home: Path, tmp_path: Path) -> None:
    with served(home / "wan2.1", tmp_path) as (url, _):
        made = [httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}).json()["id"] for _ in range(3)]
        size = [(tmp_path / "results" / f"{one}-0.mp4").stat().st_size for one in made if finished(url, one)]
    with served(home / "wan2.1", tmp_path, max_output=size[0] + size[1] + 10) as (url, _):
        assert [one["id"] for one in httpx.get(f"{url}/v1/videos").json()["data"]] == [made[2], made[1]]
        assert not (tmp_path / "results" / f"{made[0]}-0.mp4").exists()
    with served(home / "wan2.1", tmp_path, expire_after=0.0) as (url, _):
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []
        assert not list(tmp_path.rglob("*.mp4"))


def test_changes_of_jobs_are_streamed(videos: Server) -> None:
    url, _ = videos
    seen: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{url}/v1/jobs", timeout=30) as events:
        lines = events.iter_lines()
        video = httpx.post(f"{url}/v1/videos", json={"prompt": "streamed", **SMALL}).json()["id"]
        while not (seen and seen[-1]["id"] == video and seen[-1]["status"] == "completed"):
            line = next(lines)
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
    assert {"queued", "completed"} <= {one["status"] for one in seen if one["id"] == video}


def test_figures_for_prometheus(videos: Server) -> None:
    url, _ = videos
    finished(url, httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}).json()["id"])
    text = httpx.get(f"{url}/metrics").text
    assert "halovae_ranks_ready 1.0" in text
    assert "halovae_decode_peak_allocated_bytes 1.048576e+08" in text
    done = [line for line in text.splitlines() if line.startswith('halovae_jobs_completed_total{kind="video"}')]
    assert float(done[0].split()[-1]) >= 1


@pytest.mark.parametrize("model", ["wan2.1", "qwen-image-edit"])
def test_no_request_makes_the_front_fail(model: str, home: Path, tmp_path: Path) -> None:
    """schemathesis makes valid and invalid requests from the server's own OpenAPI description."""
    with served(home / model, tmp_path, queue=10_000) as (url, _):
        words = ["run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "20", "--seed", "1"]
        words += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "30"]
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert "Selected: 14/14" in done.stdout, done.stdout[-3000:]
