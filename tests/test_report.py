"""Reports of decodes: on one rank, on two, and on the command line."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from samples import latents, vae
from typer.testing import CliRunner

import halovae
from halovae import Grid
from halovae.cli.main import app
from halovae.device.kinds import Device
from halovae.device.memory import LiveBytes, Memory, MemoryMeter
from halovae.distributed.ranks import Ranks
from halovae.io import latents as latents_file
from halovae.report import DecodeReport


def reported() -> DecodeReport:
    stream = halovae.load(vae("wan2.1")).stream(latents("wan2.1"), grid=Grid(rows=2))
    stream.join()
    return stream.shared_report()


def test_every_rank_has_the_report_of_all_ranks(ranks: Callable[[int], Ranks]) -> None:
    report, other = ranks(2).run(reported)
    assert report == other
    assert [rank.rank for rank in report.ranks] == [0, 1]
    assert (report.family, report.grid, report.device, report.dtype) == ("wan2.1", "2x1", "cpu", "float32")
    assert report.latents == (1, 16, 3, 7, 6)
    assert report.frames == (1, 3, 9, 56, 48)
    for rank in report.ranks:
        assert 0 < rank.waiting < rank.seconds <= report.seconds
        assert rank.messages > 30
        assert rank.memory.peak_reserved > rank.memory.peak_allocated > 0
        assert rank.memory.remaining > 0
    assert report.memory.remaining == min(rank.memory.remaining for rank in report.ranks)
    assert report.memory.peak_allocated == max(rank.memory.peak_allocated for rank in report.ranks)
    assert report.memory.above_resting == max(rank.memory.above_resting for rank in report.ranks)
    assert report.ranks[1].messages == report.ranks[0].messages + 3  # the frames of three chunks, to rank 0
    parsed = json.loads(report.as_json())
    assert parsed["seconds"] == report.seconds
    assert parsed["ranks"][1]["memory"]["peak_allocated"] == report.ranks[1].memory.peak_allocated
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    assert "wan2.1 1x16x3x7x6 on 2x1 (cpu, float32)" in console.export_text()


def test_a_report_is_complete_after_the_last_frames() -> None:
    decoder = halovae.load(vae("wan2.1"))
    stream = decoder.stream(latents("wan2.1"))
    next(stream)
    with pytest.raises(RuntimeError, match="once its last frames have been taken"):
        _ = stream.report
    assert stream.join() is not None
    assert stream.report.first_use
    again = decoder.stream(latents("wan2.1"))
    again.join()
    assert not again.report.first_use
    assert again.report.ranks[0].messages == 0


def test_the_callers_time_between_chunks_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    stream = halovae.load(vae("wan2.1")).stream(latents("wan2.1"))
    now = time.perf_counter
    skipped = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now() + skipped[0])
    for _ in stream:
        skipped[0] += 1000
    assert stream.report.seconds < 1000


def test_live_bytes_are_those_of_live_tensors() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:].add_(1)  # views and in-place work take nothing
        assert live.live == 4000
        c = torch.cat([b, b]).reshape(-1)
        assert live.live == live.peak == 4000 + 6400
        del a, b
        assert live.live == 6400
    assert live.peak == 10400
    del c
    assert live.live == 0


def allocated_and_freed() -> Memory:
    meter = MemoryMeter(Device(torch.device("cpu")))
    with meter.counting():
        taken = torch.ones(64 * 2**18)  # 64 MiB
        del taken
    return meter.read()


def test_a_meter_sees_memory_that_was_allocated_and_freed() -> None:
    with Ranks(1) as ranks:  # in a process of its own: malloc would reuse memory that earlier tests freed
        (memory,) = ranks.run(allocated_and_freed)
    assert memory.peak_allocated == 64 * 2**20
    assert 60 * 2**20 < memory.above_resting < 200 * 2**20
    assert memory.pool_overhead == max(0, memory.above_resting - memory.peak_allocated)


def test_the_command_writes_its_report(tmp_path: Path) -> None:
    vae("wan2.1").save_pretrained(tmp_path / "vae")
    latents_file.save(tmp_path / "z.safetensors", latents("wan2.1", frames=2), "wan2.1", scaled=False, fps=8)
    words = ["decode", tmp_path / "z.safetensors", "--model", tmp_path / "vae", "-o", tmp_path / "frames"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--report", tmp_path / "report.json"]])
    assert done.exit_code == 0, done.output
    assert "peak" in done.output
    assert json.loads((tmp_path / "report.json").read_text())["frames"] == [1, 3, 5, 56, 48]
