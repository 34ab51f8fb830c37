"""An audit of the server by attack: for each of its findings, by number, a test that failed then.

Other tests of the same matters are in the files of their topics.
"""

import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed.test_ports import Watch
from PIL import ImageOps
from safetensors.torch import load_file
from samples import vae
from serving.clients import ID, SPEC, Restarts, connected, finished, job_on_disk, runs, sent, shown, submitted, until
from serving.hostile import MIB, PLAIN, data_url, edit, error_of, many_fields, near_boundaries, picture
from serving.server import Server
from serving.stub_ranks import DECODE, Rank, StubRanks, locked, served
from typer.testing import CliRunner

import halovae
from halovae.cli.main import app as cli
from halovae.errors import CheckpointError, PromptError, RankError
from halovae.models import load as checkpoints
from halovae.pipelines.specs import Pipeline, Prompt
from halovae.serving import events, fetch, pictures, routes, supervisor
from halovae.serving.jobs import TRIES, Job
from halovae.serving.table import opened

# 1. Code execution through a store that listens on all interfaces.


def test_a_server_listens_on_loopback_only(model: Path, tmp_path: Path) -> None:
    with Watch() as watch, Server(model, tmp_path / "served") as server:
        server.wait()
        ranks = {rank.pid for rank in server.ranks()}
        server.stop()
    watch.check()
    assert watch.opened[("127.0.0.1", server.port)] == server.process.pid
    assert len(ranks) == 2
    assert ranks <= set(watch.opened.values()), "a rank was not seen listening"


# 2. Planned restarts that fail a healthy job.


@pytest.mark.parametrize("ends", [1, TRIES + 1])
def test_planned_ends_never_count_against_a_job(ends: int, model: Path, tmp_path: Path) -> None:
    video = ""
    for _ in range(ends):
        with served(model, tmp_path, stub=False, drain=0.1) as (url, _):
            video = video or submitted(url)
            rank = Rank(tmp_path)
            rank.send("started", attempt=rank.receive()["attempt"])
            until(partial(runs, url, video))
    kept = job_on_disk(tmp_path, video)
    assert (kept.status, kept.interrupted, kept.attempts) == ("queued", {}, ends)
    with served(model, tmp_path) as (url, _):
        assert finished(url, video)["status"] == "completed"


# 3. A rank that hangs.


def test_ranks_that_make_no_progress_are_restarted(model: Path, tmp_path: Path) -> None:
    """Signs of life alone are no progress: they come from a thread of their own."""
    restarts = Restarts()
    with served(model, tmp_path, stub=False, restart=restarts, stall_timeout=1.0) as (url, _):
        rank = Rank(tmp_path)
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        time.sleep(1.5)
        assert restarts.reasons == []  # nothing to do is no stall
        video = submitted(url)
        rank.send("started", attempt=rank.receive()["attempt"])
        while not restarts.reasons:
            rank.send("beat", ready=True, token=rank.token, since=0.0)
            time.sleep(0.1)
        assert "no progress for 1 s (--stall-timeout)" in restarts.reasons[0]
        assert httpx.get(f"{url}/health").status_code == 503
        rank = Rank(tmp_path)
        attempt = rank.receive()["attempt"]
        assert job_on_disk(tmp_path, video).interrupted == {"stall": 1}
        rank.send("started", attempt=attempt)
        rank.send("finished", attempt=attempt, decode=DECODE)
        assert finished(url, video)["status"] == "completed"


# 4. Access: here, names that a page of another site resolves to this server.


HOSTS = [
    # host, options, status
    ("127.0.0.1:8080", {}, 200), ("localhost", {}, 200), ("localhost.:80", {}, 200), ("app.localhost", {}, 200),
    ("[::1]:8080", {}, 200), ("127.1.2.3", {}, 200), ("LOCALHOST", {}, 200),
    ("evil.example", {}, 421), ("localhost.evil.example", {}, 421), ("10.0.0.1", {}, 421), ("[", {}, 421),
    ("evil.example", {"trusted_hosts": ("*",)}, 200), ("a.example", {"trusted_hosts": ("A.example",)}, 200),
    ("b.a.example", {"trusted_hosts": ("*.a.example",)}, 200), ("ba.example", {"trusted_hosts": ("*.a.example",)}, 421),
    ("localhost", {"trusted_hosts": ("a.example",)}, 200),
    ("evil.example", {"api_key": "secret"}, 200), ("evil.example", {"api_key": "secret", "trusted_hosts": ("a",)}, 421),
    ("a:1", {"api_key": "secret", "trusted_hosts": ("a",)}, 200),
    ("localhost", {"api_key": "secret", "trusted_hosts": ("a",)}, 421),
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, *(given for _, given, _ in HOSTS if given)], ids=str)
def test_a_server_is_called_by_its_own_names_only(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False, **options) as (url, _):
        for host, given, status in HOSTS:
            if given == options:
                answer = httpx.get(f"{url}/v1/models", headers={"host": host, **sent("secret")})
                assert answer.status_code == status, host
                if status == 421:
                    assert answer.json()["error"]["code"] == "unknown_host"
                    assert httpx.get(url, headers={"host": host}).status_code == 421


# 5. An end that the database could not take.


def test_jobs_that_end_while_the_database_is_locked_end(
    model: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        rank = Rank(tmp_path)
        videos = [submitted(url) for _ in range(2)]
        attempts = [rank.receive()["attempt"] for _ in videos]
        with locked(tmp_path):
            for attempt in attempts:
                rank.send("started", attempt=attempt)
            rank.send("finished", attempt=attempts[0], decode=DECODE)
            rank.send("failed", attempt=attempts[1], code="out_of_memory", message="no plan fits \ud800")
            heard("failed")
            assert [finished(url, video, 0)["status"] for video in videos] == ["queued"] * 2
        shown = [finished(url, video) for video in videos]
    assert [one["status"] for one in shown] == ["completed", "failed"]
    assert shown[1]["error"] == {"code": "out_of_memory", "message": "no plan fits ?"}


# 6. Files of others that a start deleted.


@pytest.mark.parametrize("folder", [".", "results"])
@pytest.mark.parametrize(
    "name",
    [
        "video_holiday-2024.mp4", "image_001-final.psd", "video_clips-old/", f"video_{ID}-0.mp4", f"image_{ID}-3.png",
        ".video_draft-1.mp4.partial", f".video_{ID}-0.mp4.partial.bak", f".video_{ID}-0.mp4.partial/",
    ],
)  # fmt: skip
def test_a_start_leaves_other_files(name: str, folder: str, model: Path, tmp_path: Path) -> None:
    theirs = tmp_path / folder / name
    theirs.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        theirs.mkdir()
    else:
        theirs.write_text("mine")
    with served(model, tmp_path, stub=False):
        pass
    assert theirs.exists()


# 7. A damaged database, or one of another version.


def test_a_damaged_database_is_moved_aside_and_results_are_taken_over(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, tmp_path) as (url, _):
        video = finished(url, submitted(url))
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"jobs.sqlite{suffix}").unlink(missing_ok=True)
    noise = bytes(range(256)) * 32
    (tmp_path / "jobs.sqlite").write_bytes(noise)
    with served(model, tmp_path, stub=False) as (url, _):
        assert shown(url, video["id"]) == video
        submitted(url)
    (aside,) = tmp_path.glob("jobs.sqlite.damaged-*")
    assert aside.read_bytes() == noise
    assert [one.getMessage() for one in caplog.records if "is damaged" in one.getMessage()] == [
        f"{tmp_path / 'jobs.sqlite'} is damaged (file is not a database): it was moved to {aside.name}, and waiting "
        "jobs are lost"
    ]


# 8. Requests that made a 500.


@pytest.mark.parametrize("error", [TypeError("a"), KeyError(1), IndexError(), MemoryError(), RecursionError()])
def test_all_errors_of_the_decoder_are_the_clients_mistake(
    error: Exception, hostile_edits: tuple[str, StubRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert error_of(edit(hostile_edits[0]))["param"] == "image"


# 9. Pictures that were decoded before they were counted.


def test_pictures_are_decoded_last(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def checked(data: bytes, param: str, most_pixels: int) -> bytes:
        decoded.append(param)
        return data

    monkeypatch.setattr(pictures, "checked", checked)
    with served(editor, tmp_path, stub=False, queue=1) as (url, _):
        assert "2 pictures" in error_of(edit(url, [("image", picture())] * 2))["message"]
        assert error_of(edit(url, num_inference_steps=0))["param"] == "num_inference_steps"
        assert error_of(edit(url, size="8000x8000"))["param"] == "size"
        many = {"prompt": "a", "input_reference": [data_url(picture())] * 5}
        assert error_of(httpx.post(f"{url}/v1/videos", json=many))["code"] == "wrong_route"
        assert decoded == []
        with concurrent.futures.ThreadPoolExecutor() as pool:
            queued = pool.submit(edit, url)
            while httpx.get(f"{url}/health").json()["jobs"]["queued"] == 0:
                time.sleep(0.01)
            assert decoded == ["image"]
            assert error_of(edit(url), 429)["code"] == "queue_full"
            assert decoded == ["image"]
            httpx.delete(f"{url}/v1/images/{next((tmp_path / '.inputs').iterdir()).name[:38]}")
            assert error_of(queued.result())["code"] == "cancelled"


# 10. Limits that seconds times frames per second passed.


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


# 11. Bodies that froze the event loop.


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", many_fields(10 * MIB), 413),
        ("application/json", b'{"image": [' + b"[]," * (10 * MIB // 3) + b"[]]}", 413),
        ("application/json", b'{"image": [' + b'"data:",' * (10 * MIB // 8) + b"0]}", 413),
        ("application/json", many_fields(MIB), 400),
        ("application/json", b'{"image": [' + b"[]," * (MIB // 3 - 10) + b"[]]}", 400),
        ("application/json", b'{"image": [' + b"0," * (MIB // 2 - 10) + b"0]}", 400),
        ("application/json", json.dumps({"image": data_url(b"\0" * 7 * MIB)}).encode(), 400),
        ("multipart/form-data; boundary=b", near_boundaries(10 * MIB), 400),
        ("multipart/form-data; boundary=b", b"--b\r\n" * (2 * MIB), 400),
        ("application/x-www-form-urlencoded", b"a=b&" * (10 * MIB // 4), 413),
        ("application/x-www-form-urlencoded", b"a=b&" * (MIB // 4 - 10), 400),
    ],
)
def test_large_bodies_do_not_keep_others_waiting(
    kind: str, body: bytes, status: int, hostile_edits: tuple[str, StubRanks]
) -> None:
    url, _ = hostile_edits
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hostile = pool.submit(httpx.post, f"{url}/v1/images/edits", content=body, headers={"content-type": kind})
        answers = 0
        while not hostile.done() or answers == 0:
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
            answers += 1
        assert len(hostile.result().content) < 1000
        error_of(hostile.result(), status)


# 12. Connections that were kept for ever.


def test_idle_connections_give_way_to_new_ones(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False, max_connections=5) as (url, _):
        idle = [connected(url, b"GET / HTTP/1.1\r\n") for _ in range(30)]
        for _ in range(3):
            assert httpx.get(f"{url}/livez").status_code == 200
        closed = 0
        for connection in idle:
            connection.settimeout(0.2)
            try:
                closed += connection.recv(1) == b""
            except ConnectionError:
                closed += 1
            except TimeoutError:
                pass
            connection.close()
        assert closed >= 25


# 13. Listeners that each cost the loop for every event.


@pytest.mark.anyio
async def test_a_change_is_rendered_once_for_all_listeners() -> None:
    rendered: list[str] = []

    async def render(job: str) -> bytes:
        rendered.append(job)
        return job.encode()

    hub = events.Events(render)
    running = asyncio.create_task(hub.run())
    jobs = [Job.new("video", "tiny", SPEC, owner) for owner in ("a", "b")]
    with hub.listening("a") as ours, hub.listening("a") as also_ours, hub.listening("b") as theirs:
        for _ in range(100):
            for job in jobs:
                hub.publish(job)
        assert [await anext(one) for one in (ours, also_ours, theirs)] == [
            jobs[0].id.encode(), jobs[0].id.encode(), jobs[1].id.encode()
        ]  # fmt: skip
    assert rendered == [job.id for job in jobs]
    running.cancel()


# 14. Addresses inside that passed for public ones.


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("2002:808:808::1", True), ("127.0.0.1", False), ("10.0.0.1", False), ("169.254.169.254", False),
        ("100.100.100.200", False), ("224.0.0.1", False), ("240.0.0.1", False), ("0.0.0.0", False),
        ("192.0.0.192", False), ("168.63.129.16", False), ("::ffff:168.63.129.16", False), ("::1", False),
        ("::", False), ("::127.0.0.1", False), ("::ffff:127.0.0.1", False), ("::ffff:0:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False), ("64:ff9b:1::808:808", False), ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::", False), ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("fec0::1", False),
        ("fe80::1", False), ("fd00:ec2::254", False), ("3fff::1", False), ("ff0e::1", False), ("2001:db8::1", False),
        ("5f00::1", False),
    ],
)  # fmt: skip
def test_addresses_on_the_public_internet_are_told_from_others(address: str, public: bool) -> None:
    assert fetch.is_public(ip_address(address)) is public


# 15. Files: here, input pictures that nobody needs.


def test_input_pictures_of_jobs_that_do_not_wait_are_removed(model: Path, tmp_path: Path) -> None:
    inputs = tmp_path / ".inputs"
    inputs.mkdir()
    jobs = opened(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", SPEC)
    jobs.add(job)
    jobs.close()
    kept, orphan, other = inputs / f"{job.id}-0.png", inputs / f"video_{'0' * 32}-0.png", inputs / "notes.png"
    for path in (kept, orphan, other):
        path.touch()
    with served(model, tmp_path, stub=False):
        assert sorted(inputs.iterdir()) == sorted([kept, other])


# 16. A full disk that stranded a job.


def test_a_job_that_ends_while_the_disk_is_full_ends_once_there_is_room(
    model: Path, tmp_path: Path, heard: Callable[[str], None]
) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with served(model, tmp_path, stub=False) as (url, _):
            rank = Rank(tmp_path)
            video = submitted(url)
            attempt = rank.receive()["attempt"]
            filling = tmp_path / "filling"
            with filling.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            rank.send("started", attempt=attempt)
            rank.send("finished", attempt=attempt, decode=DECODE)
            heard("finished")
            assert finished(url, video, 0)["status"] == "queued"
            filling.unlink()
            assert finished(url, video)["status"] == "completed"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# 17. A sweep that ended for ever.


def test_a_sweep_that_fails_is_logged_and_tried_again(
    model: Path, tmp_path: Path, swept: Callable[[], BaseException | None], caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, tmp_path) as (url, _):
        finished(url, submitted(url))
    with ExitStack() as lock:
        lock.enter_context(locked(tmp_path))
        with served(model, tmp_path, stub=False, expire_after=0.0) as (url, _):
            while swept() is None:
                pass
            lock.close()
            while swept() is not None:
                pass
            assert httpx.get(f"{url}/v1/videos").json()["data"] == []
    assert not list(tmp_path.rglob("*.mp4"))
    assert "old results could not be removed" in caplog.text


# 18. A blank key.


@pytest.mark.parametrize("key", ["", " \t\n"])
def test_a_blank_key_is_refused(key: str, model: Path, tmp_path: Path) -> None:
    words = ["serve", "--model-path", str(model), "--output-dir", str(tmp_path / "out"), "--api-key", key]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert "--api-key (or HALOVAE_API_KEY) is blank" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


# 19. A crash loop without end.


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
    assert gave_up.value.code == supervisor.GAVE_UP
    assert started == [2] * expected
    assert received.recv() == "a rank failed"


class KilledAgent:
    """An agent that is its only rank, and that the system kills while it loads."""

    started = 0
    exitcode, pid = -signal.SIGKILL, os.getpid()

    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        KilledAgent.started += 1
        assert KilledAgent.started < 3, "it is started again and again"

    def is_alive(self) -> bool:
        return False


def test_a_single_rank_that_is_killed_while_it_loads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = Path("unused")
    one = supervisor.Supervisor(1, settings)
    monkeypatch.setattr(one._context, "Process", KilledAgent)
    monkeypatch.setattr(KilledAgent, "started", 0)
    with pytest.raises(supervisor.RanksLost, match="SIGKILL"):
        asyncio.run(one.run())
    assert KilledAgent.started == 1


# 20. A size with fewer tokens than ranks.


@pytest.mark.parametrize(("name", "tokens"), [("wan2.1", 1), ("flux", 1), ("sd1.5", None)])
def test_ranks_that_share_a_sequence_need_a_token_each(
    name: str, tokens: int | None, models: Callable[[str], Path]
) -> None:
    pipeline = replace(Pipeline.read(models(name)), sharing=2)
    least = Prompt("a cat", size=(pipeline.step, pipeline.step), frames=1)
    if tokens is None:  # its ranks only share the decode
        assert pipeline.fitted(least).size == least.size
        return
    with pytest.raises(PromptError, match=f"{tokens} tokens for the 2 ranks") as refused:
        pipeline.fitted(least)
    assert refused.value.field == "size"
    assert pipeline.fitted(replace(least, size=(2 * pipeline.step, pipeline.step))).frames == 1


# 21. The channel between the front and rank 0.


def test_a_process_without_the_token_gets_no_job(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        with pytest.raises(AssertionError):
            Rank(tmp_path, token="a guess", patience=1.0)
        assert httpx.get(f"{url}/health").status_code == 503
        submitted(url)
        assert Rank(tmp_path).receive()["kind"] == "attempt"
    assert "does not know this server's token" in caplog.text


# 22. Weights outside of the model's folder.


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "../../secret.safetensors",
        "/etc/secret.safetensors",
        "part/../../secret.safetensors",
        "",
    ],
)
def test_an_index_names_only_files_beside_it(name: str, tmp_path: Path) -> None:
    vae("wan2.1").save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / checkpoints.WEIGHTS
    index = tmp_path / "vae" / f"{checkpoints.WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), name)}))
    weights.rename(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"index.json: weight_map names '.*'; expected the name of a file beside"):
        halovae.load(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="weight_map"):
        checkpoints.check_indices(tmp_path)  # of a whole pipeline


# 23. The log: here, control characters of paths.


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


# 24. What operators expect: here, alive and ready told apart.


def test_a_server_lives_before_its_ranks_are_ready(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False) as (url, _):
        assert httpx.get(f"{url}/livez").json() == {"status": "alive"}
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "the ranks are starting"})
        assert int(answer.headers["retry-after"]) > 0
