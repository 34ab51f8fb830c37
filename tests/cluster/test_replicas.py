"""Replicas: which one gets a job, how many there are, and what becomes of the jobs of one that is lost."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster.replicas_here import Replicas
from playwright.sync_api import Browser, expect
from serving.clients import SMALL, SPEC, finished, job_on_disk, runs, shown, submitted, until
from serving.hostile import picture
from serving.stub_ranks import StubRanks, rank_settings, served

from halovae.serving import results, scaling
from halovae.serving.attempts import RunningAttempt
from halovae.serving.jobs import HOSTS, Job, interrupted
from halovae.serving.replica_agent import End, Wish
from halovae.serving.replicas import Replica, Turn, room
from halovae.serving.scaling import Scaling

# Which replica gets a job.


def job(steps: int = 10, alone: bool = False) -> Job:
    return replace(Job.new("video", "tiny", replace(SPEC, steps=steps)), alone=alone)


def attempt(steps: int = 10, done: int = 0, alone: bool = False) -> RunningAttempt:
    """An attempt that has been denoised for so many steps; for none, it waits."""
    made = RunningAttempt(job(steps, alone))
    if done:
        made.begin("denoising")
        made.advance("denoising", done)
    return made


def turn(*attempts: list[RunningAttempt]) -> Turn:
    """A round over replicas "0", "1", ... that have these attempts."""
    replicas = [Replica(str(number), is_ready=True) for number in range(len(attempts))]
    return Turn(replicas, {one.name: held for one, held in zip(replicas, attempts, strict=True)}, decode_batch=4)


def placed(turn: Turn, *jobs: Job) -> list[str | None]:
    found = [turn.place(one) for one in jobs]
    return [one.name if one is not None else None for one in found]


def test_jobs_go_to_the_replica_with_the_least_work_left() -> None:
    assert placed(turn([attempt(done=2)], [attempt(done=8)], [attempt(50, done=10)]), job()) == ["1"]
    assert placed(turn([attempt()], []), job(), job()) == ["1", "0"]
    assert placed(turn([], []), *(job() for _ in range(5))) == ["0", "1", "0", "1", None]


def test_a_replica_that_is_full_or_not_ready_gets_no_job() -> None:
    full, free = [attempt(1, done=1), attempt(1)], [attempt(1000, done=1)]
    assert room(full, decode_batch=4) == 0
    assert placed(turn(full, free), job()) == ["1"]
    lost = turn([], free)
    lost._replicas["0"].lose()
    assert placed(lost, job()) == ["1"]


def test_a_replica_holds_the_job_that_is_denoised_the_next_one_and_those_that_are_decoded() -> None:
    decoding = [attempt(1, done=1) for _ in range(8)]
    for one in decoding:
        one.begin("decoding")
    assert room([], decode_batch=4) == room(decoding, decode_batch=4) == 2
    assert room([*decoding, attempt()], decode_batch=4) == 1
    assert room([*decoding, attempt(), attempt()], decode_batch=4) == 0


def test_a_job_that_runs_alone_waits_for_an_idle_replica_and_holds_up_one_only() -> None:
    busy = turn([attempt(done=9)], [attempt(done=1)], [attempt(done=1)])
    assert placed(busy, job(alone=True), job(), job(), job()) == [None, "1", "2", None]  # "0" is emptied for it
    assert placed(turn([attempt(done=9)], []), job(alone=True), job()) == ["1", "0"]
    assert placed(turn([attempt(alone=True)], [attempt(9, done=1)]), job(), job()) == ["1", None]


# How many there are.


@pytest.mark.parametrize(
    ("present", "ready", "waiting", "expected"),
    [
        (1, 1, 0, 1),
        (1, 1, 1, 2),
        (1, 1, 4, 3),
        (3, 1, 4, 3),  # two are starting, which suffices
        (3, 3, 4, 5),
        (3, 3, 40, 5),
        (0, 0, 0, 1),
    ],
)
def test_replicas_are_added_for_jobs_that_wait(present: int, ready: int, waiting: int, expected: int) -> None:
    rule = Scaling(1, 5, idle=60)
    rule.count(0.0, present, ready, waiting)
    assert rule.count(scaling.PATIENCE - 0.1, present, ready, waiting) == max(1, present)
    assert rule.count(scaling.PATIENCE, present, ready, waiting) == expected


def test_jobs_that_wait_for_a_moment_only_add_no_replica() -> None:
    rule = Scaling(1, 5, idle=60)
    for second in range(20):
        assert rule.count(float(second), 1, 1, waiting=second % 4) == 1


def test_idle_replicas_are_ended_one_by_one_but_for_the_least() -> None:
    rule = Scaling(2, 5, idle=60)
    ready = {"0", "1", "2", "10"}
    assert rule.idle_one(100.0, 0, {"0": 0.0, "1": 0.0, "2": 41.0, "10": 0.0}, ready) == "10"
    assert rule.idle_one(100.0, 0, {"0": 0.0, "1": 0.0, "2": 41.0, "10": 0.0}, {"2", "10"}) == "1"
    assert rule.idle_one(100.0, 0, {"0": 0.0, "1": 99.0, "2": 41.0}, ready) == "0"
    assert rule.idle_one(100.0, 0, {"0": 99.0, "1": 99.0, "2": 41.0}, ready) is None
    assert rule.idle_one(100.0, 1, {"0": 0.0, "1": 0.0, "2": 0.0}, ready) is None  # a job waits
    assert rule.idle_one(100.0, 0, {"0": 0.0, "1": 0.0}, ready) is None


# A front with replicas, over the true channel: TCP, encrypted, with files that travel.


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("wan2.1")


@contextmanager
def fronted(model: Path, output: Path, least: int = 2, most: int = 2, **options: Any) -> Iterator[tuple[str, Replicas]]:
    """A front without ranks: its URL, and its replicas."""
    output.mkdir(exist_ok=True)
    fleet = Replicas(least, most, rank_settings(model, output), options.pop("idle", 300.0))
    with served(model, output, stub=False, fleet=fleet, **options) as (url, _):
        yield url, fleet


def table(url: str) -> list[dict[str, Any]]:
    """The replicas as `/health` shows them."""
    replicas: list[dict[str, Any]] = httpx.get(f"{url}/health").json()["replicas"]
    return replicas


def wait_for(url: str, *states: str) -> None:
    until(lambda: [one["state"] for one in table(url)] == list(states))


def held(replicas: Replicas, name: str, folder: Path) -> StubRanks:
    """Ranks that stay at the first step of each attempt."""
    made = replicas.start(name, folder)
    made.held.set()
    return made


def test_jobs_are_spread_over_replicas_and_their_files_come_back(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out") as (url, replicas):
        wait_for(url, "placing", "placing")
        ranks = [held(replicas, name, tmp_path / f"on-host-{name}") for name in "01"]
        wait_for(url, "ready", "ready")
        videos = [submitted(url, n=2) for _ in range(6)]
        until(lambda: [one["jobs"] for one in table(url)] == [2, 2])
        for one in ranks:
            one.held.clear()
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 6
        for video in videos:
            for index in range(2):
                content = httpx.get(f"{url}/v1/videos/{video}/content", params={"index": index}).content
                assert content[4:8] == b"ftyp"
        assert all(len(one.seen) >= 2 for one in ranks)
        assert sum(one["completed"] for one in table(url)) == 6
        assert {path.suffix for path in (tmp_path / "out/results").iterdir()} == {".mp4", ".json", ""}
        assert not [*(tmp_path / "on-host-0").iterdir(), *(tmp_path / "on-host-1").iterdir()]


def test_pictures_travel_to_replicas(models: Callable[[str], Path], tmp_path: Path) -> None:
    with fronted(models("qwen-image-edit"), tmp_path / "out", least=1, most=1) as (url, replicas):
        ranks = replicas.start("0", tmp_path / "host")
        wait_for(url, "ready")
        files = {"image": ("a.png", picture("png"), "image/png")}
        answer = httpx.post(f"{url}/v1/images/edits", data={"prompt": "a"}, files=files, timeout=60)
        assert answer.status_code == 200, answer.text
        (seen,) = ranks.seen
        assert seen["prompt"]["images"] == []
        assert [one[:4] for one in seen["pictures"]] == [b"\x89PNG"]


def test_jobs_of_a_lost_host_are_made_elsewhere_and_it_counts_against_none(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out") as (url, replicas):
        first, second = (held(replicas, name, tmp_path / name) for name in "01")
        wait_for(url, "ready", "ready")
        videos = [submitted(url) for _ in range(4)]
        until(lambda: all(len(one.seen) == 1 for one in (first, second)))
        until(lambda: sum(runs(url, video) for video in videos) == 2)
        replicas.tell("1", "ended", "its host cannot be reached", lost_host=True)
        until(lambda: sum(runs(url, video) for video in videos) == 1)
        assert [one["state"] for one in table(url)] == ["ready", "ended"]
        second.held.clear()  # it was only cut off, and goes on: nobody hears it
        until(lambda: not second.channel._known)
        first.held.clear()
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 4
        kept = [job_on_disk(tmp_path / "out", video) for video in videos]
        assert sorted((one.attempts, one.interrupted.get("host", 0)) for one in kept) == [(1, 0)] * 3 + [(2, 1)]
        assert not any(one.alone or one.interrupted.keys() - {"host"} for one in kept)
        assert len(first.seen) == 4
        assert [one["completed"] for one in table(url)] == [4, 0]
        text = httpx.get(f"{url}/metrics").text
        assert 'halovae_jobs_completed_total{kind="video"} 4.0' in text
        assert 'halovae_replica_completed_total{replica="0"} 4.0' in text
        assert 'halovae_replica_ready{replica="1"} 0.0' in text


def test_a_job_that_ends_its_ranks_is_found_out_as_on_one_host(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out", least=1, most=1) as (url, replicas):
        held(replicas, "0", tmp_path / "0")
        video = submitted(url)
        for count in (1, 2):
            until(lambda: runs(url, video))
            replicas.tell("0", "ended", "a rank ended")
            until(lambda: shown(url, video)["status"] == "queued")
            assert job_on_disk(tmp_path / "out", video).interrupted == {"ranks": count}
            held(replicas, "0", tmp_path / str(count))
        until(lambda: runs(url, video))
        replicas.tell("0", "ended", "a rank ended")
        assert finished(url, video)["error"]["code"] == "interrupted"
        assert table(url)[0]["restarts"] == 2


def test_a_job_that_loses_one_host_after_the_other_is_given_up() -> None:
    """Such as one that takes all memory of its pod."""
    fatal, beside = job(), job()
    for count in range(1, HOSTS):
        changes = interrupted(fatal, "host", only=count > 1)
        assert (changes["status"], changes["alone"]) == ("queued", count > 1)
        fatal = replace(fatal, interrupted=changes["interrupted"], alone=changes["alone"])
    given_up = interrupted(fatal, "host", only=True)
    assert (given_up["status"], given_up["error_code"]) == ("failed", "interrupted")
    assert given_up["error_message"].startswith(f"the host was lost {HOSTS} times while only this job was running")
    for _ in range(2 * HOSTS):
        changes = interrupted(beside, "host", only=False)
        assert changes["status"] == "queued"
        beside = replace(beside, interrupted=changes["interrupted"])


def test_earlier_ranks_and_strangers_are_not_heard(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out", least=1, most=1) as (url, replicas):
        replicas.tell("0", "running")
        old = replicas.link("0", tmp_path / "old")
        StubRanks(replicas.link("0", tmp_path / "stranger", token="0" * 32))
        StubRanks(replicas.link("0", tmp_path / "other", key=b"a" * 40))
        StubRanks(replicas.link("7", tmp_path / "seventh"))
        time.sleep(1.5)  # longer than a beat
        assert table(url)[0]["state"] == "running"
        replicas.start("0", tmp_path / "new")
        wait_for(url, "ready")
        late = StubRanks(old)
        assert finished(url, submitted(url))["status"] == "completed"
        time.sleep(1.5)
        assert not late.seen
        assert table(url)[0]["restarts"] == 0


def test_ranks_that_are_said_to_have_ended_after_others_were_heard_take_these_nothing(
    model: Path, tmp_path: Path
) -> None:
    with fronted(model, tmp_path / "out", least=1, most=1) as (url, replicas):
        replicas.start("0", tmp_path / "old")
        wait_for(url, "ready")
        since = replicas.replicas["0"].since
        replicas.start("0", tmp_path / "new")
        until(lambda: table(url)[0]["restarts"] == 1)
        wait_for(url, "ready")
        replicas.tell("0", "ended", "its host cannot be reached", lost_host=True, since=since)
        wait_for(url, "ready")
        assert replicas.replicas["0"].peer is not None
        assert replicas.replicas["0"].cause == "ranks"
        replicas.tell("0", "ended", "its host cannot be reached", since=replicas.replicas["0"].since)
        wait_for(url, "ended")


def test_a_result_that_the_front_cannot_write_fails_its_job_only(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, full = results.receive, [True]

    def limited(*piece: Any) -> None:
        if full:
            full.pop()
            raise OSError(28, "No space left on device")
        receive(*piece)

    monkeypatch.setattr(results, "receive", limited)
    with fronted(model, tmp_path / "out", least=1, most=1) as (url, replicas):
        replicas.start("0", tmp_path / "host")
        wait_for(url, "ready")
        failed = finished(url, submitted(url))
        assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full")
        assert finished(url, submitted(url))["status"] == "completed"


def test_pieces_of_a_file_make_the_file(tmp_path: Path) -> None:
    results.receive(tmp_path / "a.mp4", b"of an earlier attempt", first=True, last=False)
    results.receive(tmp_path / "a.mp4", b"abc", first=True, last=False)
    assert not (tmp_path / "a.mp4").exists()
    results.receive(tmp_path / "a.mp4", b"def", first=False, last=True)
    assert [*tmp_path.iterdir()] == [tmp_path / "a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"abcdef"


def test_a_full_disk_keeps_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    results.receive(tmp_path / "a.mp4", b"abc", first=True, last=False)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        results.receive(tmp_path / "a.mp4", b"def", first=False, last=True)
    assert not [*tmp_path.iterdir()]


def test_ranks_that_are_lost_leave_no_part_of_a_file(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out", least=1, most=1) as (url, replicas):
        held(replicas, "0", tmp_path / "0")
        video = submitted(url)
        until(lambda: runs(url, video))
        results.receive(tmp_path / f"out/results/{video}-0.mp4", b"abc", first=True, last=False)
        replicas.tell("0", "ended", "a rank ended")
        until(lambda: shown(url, video)["status"] == "queued")
        assert not [*(tmp_path / "out/results").glob(".*.partial")]


def test_replicas_come_with_the_queue_and_go_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 0.2)
    with fronted(model, tmp_path / "out", least=1, most=3, idle=1.5) as (url, replicas):
        until(lambda: replicas.sent == [Wish(frozenset("0"), frozenset())])
        first = held(replicas, "0", tmp_path / "0")
        wait_for(url, "ready")
        videos = [submitted(url) for _ in range(12)]
        wait_for(url, "ready", "placing", "placing")
        until(lambda: replicas.sent[-1] == Wish(frozenset("012"), frozenset("0")))
        others = [held(replicas, name, tmp_path / name) for name in "12"]
        wait_for(url, "ready", "ready", "ready")
        until(lambda: all(one.seen for one in others))
        for one in (first, *others):
            one.held.clear()
        assert [finished(url, video)["status"] for video in videos] == ["completed"] * 12
        until(lambda: replicas.sent[-1].names == frozenset("0"))  # type: ignore[union-attr]
        old = replicas.link("2", tmp_path / "old", since=replicas.replicas["2"].since)
        for name in "12":
            replicas.tell(name, "ended")
        wait_for(url, "ready")
        first.held.set()
        videos = [submitted(url) for _ in range(12)]
        wait_for(url, "ready", "placing", "placing")
        StubRanks(old)  # of a replica that was ended, and whose number is used again
        time.sleep(1.5)  # longer than a beat
        assert [one["state"] for one in table(url)] == ["ready", "placing", "placing"]
        first.held.clear()
        assert finished(url, videos[-1])["status"] == "completed"


def test_ranks_of_a_replica_that_make_no_progress_are_replaced(model: Path, tmp_path: Path) -> None:
    with fronted(model, tmp_path / "out", stall_timeout=1.0) as (url, replicas):
        stuck = held(replicas, "0", tmp_path / "0")
        wait_for(url, "ready", "placing")
        video = submitted(url)
        until(lambda: any(isinstance(one, End) for one in replicas.sent))
        (end,) = {one for one in replicas.sent if isinstance(one, End)}
        assert end.name == "0"
        assert "--stall-timeout" in end.reason
        replicas.tell("0", "ended", end.reason)
        until(lambda: job_on_disk(tmp_path / "out", video).interrupted == {"stall": 1})
        assert len(stuck.seen) == 1
        replicas.start("0", tmp_path / "again")
        assert finished(url, video)["status"] == "completed"


def test_the_page_has_a_table_of_replicas(model: Path, tmp_path: Path, browser: Browser) -> None:
    with fronted(model, tmp_path / "out", api_key="secret") as (url, replicas):
        replicas.start("0", tmp_path / "0")
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#state")).to_have_text(re.compile("not connected"))
        expect(page.locator("#replicas")).to_be_hidden()  # holders of keys see it
        page.fill("#key", "secret")
        rows = page.locator("#replicas tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_have_text("0readya-host000")
        replicas.tell("1", "ended", "its host <b>was lost</b>", lost_host=True)
        expect(rows.nth(1)).to_contain_text("ended (its host <b>was lost</b>)")
        answer = httpx.post(
            f"{url}/v1/videos", json={"prompt": "a", **SMALL}, headers={"Authorization": "Bearer secret"}
        )
        assert answer.status_code == 200
        expect(rows.nth(0)).to_have_text("0readya-host010")
        page.close()
