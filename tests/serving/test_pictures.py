"""Pictures that clients send: damaged, odd, and costly ones."""

import concurrent.futures
import contextlib
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving.hostile import edit, error_of, picture
from serving.stub_ranks import StubRanks, served

from halovae.io import media
from halovae.serving import pictures, thumbnails
from halovae.serving.errors import ApiError


def test_two_pictures_are_decoded_at_once(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), 0, 0
    both = threading.Barrier(2)

    def slow(data: bytes, param: str, most_pixels: int) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        both.wait(30)
        with lock:
            now -= 1
        return picture()

    monkeypatch.setattr(pictures, "checked", slow)
    with served(editor, tmp_path) as (url, _), concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: edit(url), range(6))} == {200}
    assert most == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_a_picture_with_a_transparent_palette_takes_little_memory() -> None:
    code = """
import io, re
from pathlib import Path
from PIL import Image
from halovae.serving import pictures
def peak(): return int(re.search("VmHWM: *([0-9]+)", Path("/proc/self/status").read_text().replace("\\t", " "))[1])
out = io.BytesIO()
Image.new("P", (4000, 4000)).save(out, "png", transparency=0)
before = peak()
assert Image.open(io.BytesIO(pictures.checked(out.getvalue(), "image", 16_000_000))).getpixel((0, 0)) == (255,) * 3
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 140  # MiB; about 200 if the whole picture is composed at once


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (picture(size=(4001, 4000), mode="1"), "4001x4000 is more than 16000000 pixels"),
        (picture(size=(60_000, 1)), "60000x1: expected a side of at most 200 times the other"),
        (picture(size=(1, 201)), "1x201"),
        (picture("jpeg", progressive=True)[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\0" * 100 + b"\xff\xd9", "scans"),
    ],
    ids=["large", "wide", "high", "scans"],
)
def test_pictures_that_cost_too_much_are_refused(data: bytes, words: str, hostile_edits: tuple[str, StubRanks]) -> None:
    error = error_of(edit(hostile_edits[0], {"image": data}))
    assert error["param"] == "image"
    assert words in error["message"]


_EXIF = Image.Exif()
_EXIF.update({0x112: 6, 0x10F: "maker", 0x8769: {0x9003: "2026:01:01 00:00:00"}})


_FILES = [
    picture("jpeg", exif=_EXIF), picture("png", "P", transparency=0, exif=_EXIF), picture("webp", "RGBA", exif=_EXIF),
    picture("png", "LA"), picture("jpeg", progressive=True),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_FILES), st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=4)), max_size=6))
def test_damaged_pictures_are_the_clients_mistake(data: bytes, changes: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(data)
    for at, new in changes:
        at %= len(damaged)
        damaged[at : at + len(new)] = new
    with (
        contextlib.suppress(ApiError),
        Image.open(io.BytesIO(pictures.checked(bytes(damaged), "image", 10**6))) as plain,
    ):
        assert (plain.mode, plain.format) == ("RGB", "PNG")


@pytest.mark.anyio
async def test_small_pictures_are_drawn_in_one_pass_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, open_file = tmp_path / "a.mp4", [], av.open

    def counted(*args: Any, **options: Any) -> Any:
        opened.append(args)
        return open_file(*args, **options)

    monkeypatch.setattr(av, "open", counted)

    def write(count: int) -> None:
        sink = media.Sink(path, 16.0)
        levels = torch.linspace(0, 255, count).to(torch.uint8)
        sink.write(levels[None, :, None, None].expand(3, count, 48, 64))
        sink.close(whole=True)
        opened.clear()

    write(31)
    for _ in range(2):
        sheet = Image.open(io.BytesIO(await thumbnails.drawn(path, "spritesheet"))).convert("L")
        levels = [sheet.getpixel((64 * (cell % 4) + 32, 48 * (cell // 4) + 24)) for cell in range(16)]
        assert all(abs(level - 17 * cell) < 6 for cell, level in enumerate(levels)), levels  # type: ignore[operator]
        assert len(opened) == 1
    write(3)
    assert Image.open(io.BytesIO(await thumbnails.drawn(path, "spritesheet"))).size == (192, 48)
    assert Image.open(io.BytesIO(await thumbnails.drawn(path, "thumbnail"))).size == (64, 48)
    path.unlink()
    with pytest.raises(ApiError) as gone:
        await thumbnails.drawn(path, "thumbnail")
    assert gone.value.status == 404
