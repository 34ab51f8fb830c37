"""What a server keeps: the files of others, its results, and what became of each job."""

from pathlib import Path

import httpx
import pytest
from serving import finished, submitted
from stub_ranks import served

from halovae import tiny
from halovae.serving.jobs import Job, Jobs, Wish

ID = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wan2.1"
    tiny.make_model("wan2.1", folder)
    return folder


@pytest.mark.parametrize("folder", [".", "results"])
@pytest.mark.parametrize(
    "name",
    [
        "video_holiday-2024.mp4", "image_001-final.psd", "video_clips-old/", f"video_{ID}-0.mp4", f"image_{ID}-3.png",
        ".video_draft-1.mp4.partial", f".video_{ID}-0.mp4.partial.bak", f".video_{ID}-0.mp4.partial/",
    ],
)  # fmt: skip
def test_a_start_leaves_what_the_server_has_not_made(name: str, folder: str, model: Path, tmp_path: Path) -> None:
    theirs = tmp_path / folder / name
    theirs.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        theirs.mkdir()
    else:
        theirs.write_text("mine")
    with served(model, tmp_path, stub=False):
        pass
    assert theirs.exists()


def test_a_start_removes_partial_results(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "results" / f".video_{ID}-0.mp4.partial"
    partial.parent.mkdir()
    partial.touch()
    with served(model, tmp_path, stub=False):
        assert not partial.exists()


def test_a_lost_database_costs_no_result(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (url, _):
        result = Path(finished(url, submitted(url))["file_path"])
    made = result.read_bytes()
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    with served(model, tmp_path, stub=False) as (url, _):
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []
    assert result.read_bytes() == made


def test_results_of_an_earlier_version_are_found(model: Path, tmp_path: Path) -> None:
    """It kept them in the output folder itself."""
    jobs = Jobs(tmp_path / "jobs.sqlite")
    job = Job.new("video", "tiny", Wish("a", (64, 48), 5, 2, 0))
    jobs.add(job)
    jobs.update(job, status="completed", completed=job.created, files=job.names())
    jobs.close()
    (tmp_path / job.names()[0]).write_bytes(b"a video")
    for _ in range(2):
        with served(model, tmp_path, stub=False) as (url, _):
            assert httpx.get(f"{url}/v1/videos/{job.id}/content").content == b"a video"
    assert [path.parent.name for path in tmp_path.rglob("*.mp4")] == ["results"]
