"""Frames to files and back: whole or not at all."""

from pathlib import Path

import pytest
import torch

from halovae.io import media


def ramp(frames: int) -> torch.Tensor:
    across = torch.linspace(0, 255, 64).view(1, 1, 1, 64).expand(3, frames, 48, 64)
    return (across + torch.arange(frames).view(1, -1, 1, 1)).clamp(0, 255).to(torch.uint8)


def test_a_video_comes_back_nearly_as_it_went(tmp_path: Path) -> None:
    sink = media.Sink(tmp_path / "clip.mp4", 23.976)
    for piece in torch.split(ramp(6), 2, dim=1):
        sink.write(piece)
    sink.close(whole=True)
    frames, fps = media.read_clip(tmp_path / "clip.mp4")
    assert (frames.float() - ramp(6).float()).abs().mean() < 3
    assert fps == pytest.approx(23.976, abs=1e-3)
    assert media.read_clip(tmp_path / "clip.mp4", frames=2)[0].shape[1] == 2


@pytest.mark.parametrize("name", ["clip.mp4", "picture.png", "frames"])
def test_nothing_appears_before_the_end_nor_after_a_failure(tmp_path: Path, name: str) -> None:
    sink = media.Sink(tmp_path / name, 8)
    sink.write(ramp(1))
    assert not (tmp_path / name).exists()
    sink.close(whole=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    for whole in (True, False):
        sink = media.Sink(tmp_path / "picture.png", 1)
        sink.write(ramp(1))
        sink.close(whole=whole)
    frames, _ = media.read_clip(tmp_path / "picture.png")
    assert torch.equal(frames, ramp(1))


def test_a_leftover_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    media.partial_of(tmp_path / "frames").mkdir()
    (media.partial_of(tmp_path / "frames") / "frame_00009.png").touch()
    sink = media.Sink(tmp_path / "frames", 1)
    sink.write(ramp(2))
    sink.close(whole=True)
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["frame_00000.png", "frame_00001.png"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "frames").touch()
    with pytest.raises(ValueError, match="holds files other than numbered frames"):
        media.check_output(tmp_path / "frames")
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        media.check_output(tmp_path / "clip.mp4")
