"""How inputs are cut and scaled."""

from contextlib import suppress
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest

from halovae.cluster.facts import Facts
from halovae.cluster.rules import Bucket, Rejected, Rules, buckets_like, cropped, parse_buckets, resampled, scaled

FACTS = Facts("wan2.1", "r", spatial=8, temporal=4, first=1, clips=True, framed=True)
WIDE = Bucket(832, 480)


def test_an_input_goes_to_the_bucket_of_its_aspect_ratio() -> None:
    rules = Rules(FACTS, parse_buckets("832x480,480x832,640x640"))
    sizes = {(1920, 1080): 832, (1080, 1920): 480, (700, 640): 640}
    assert {size: rules.bucket(*size).width for size in sizes} == sizes


def test_without_buckets_an_input_keeps_its_size_but_for_a_crop() -> None:
    assert Rules(FACTS).bucket(333, 219) == (328, 216, None)
    with pytest.raises(Rejected, match="7x90 is too small"):
        Rules(FACTS).bucket(7, 90)


def test_clips_are_as_long_as_they_can_be() -> None:
    rules = Rules(FACTS, frames=(17, 81))
    assert rules.cut(200, WIDE, ended=False) == [81, 81]
    assert rules.cut(38, WIDE, ended=True) == [17, 17]
    assert Rules(FACTS).cut(38, WIDE, ended=True) == [37]
    assert Rules(FACTS).cut(38, WIDE, ended=False) == []
    own = Rules(FACTS, parse_buckets("832x480x33,832x480x5,480x832"), frames=(9,))
    assert own.cut(39, own.bucket(832, 480), ended=True) == [33, 5]
    assert own.cut(20, own.bucket(480, 832), ended=True) == [9, 9]


@pytest.mark.parametrize(
    ("buckets", "frames", "words"),
    [("100x64", (), "multiples of 8"), ("64x64", (8,), "such as 5 or 9"), ("64x64x7", (), "such as 5 or 9")],
)
def test_what_the_model_cannot_take_is_refused_at_once(buckets: str, frames: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules(FACTS, parse_buckets(buckets), frames)


def test_a_picture_covers_its_bucket_and_is_cropped_at_the_center() -> None:
    assert scaled((1920, 1080), WIDE, crops=False) == (853, 480)
    assert scaled((1000, 1000), WIDE, crops=False) == (832, 832)
    picture = np.arange(6 * 10).reshape(6, 10, 1)
    assert cropped(picture, Bucket(4, 2)).squeeze().tolist() == [[23, 24, 25, 26], [33, 34, 35, 36]]


def by_ffmpeg(source: int, fps: int, count: int) -> list[int]:
    """Which of so many frames ffmpeg's filter takes, by marks in their pixels."""
    graph = av.filter.Graph()
    gray = av.VideoFormat("gray", 16, 16)
    start = graph.add_buffer(width=16, height=16, format=gray, time_base=Fraction(1, source))
    rate, end = graph.add("fps", str(fps)), graph.add("buffersink")
    start.link_to(rate)
    rate.link_to(end)
    graph.configure()
    taken = []
    for index in [*range(count), None]:
        frame = None
        if index is not None:
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), index, np.uint8), format="gray")
            frame.pts, frame.duration, frame.time_base = index, 1, Fraction(1, source)
        graph.push(frame)
        with suppress(BlockingIOError, EOFError):
            while True:
                taken.append(int(graph.pull().to_ndarray()[0, 0]))
    return taken


@pytest.mark.parametrize("source", [32, 24, 8, 30, 10, 16])
def test_frames_are_repeated_or_left_out_as_by_ffmpeg(source: int) -> None:
    frames = [(Fraction(index, source), index) for index in range(20)]
    assert list(resampled(frames, 16)) == by_ffmpeg(source, 16, 20)


def test_without_a_rate_all_frames_are_taken() -> None:
    assert list(resampled([(Fraction(0), "a"), (Fraction(9), "b")], None)) == ["a", "b"]


def test_a_single_frame_has_no_rate() -> None:
    assert list(resampled([(Fraction(0), "picture")], 16)) == ["picture"]


def test_buckets_of_all_aspect_ratios_have_the_area_of_a_size() -> None:
    found = buckets_like((832, 480), 64)
    assert (832, 448, None) in found
    assert (448, 832, None) in found
    assert all(0.8 * 832 * 480 <= one.width * one.height <= 832 * 480 for one in found)
    assert all(one.width % 64 == one.height % 64 == 0 for one in found)


def test_a_clip_without_a_length_is_bounded() -> None:
    rules = Rules(FACTS)
    rules.check(1000, WIDE)
    with pytest.raises(Rejected, match="say by --frames how long clips are"):
        rules.check(2000, WIDE)


def test_text_that_names_no_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="comma-separated"):
        parse_buckets("832x480,wide")
