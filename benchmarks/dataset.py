"""Clips encoded a second by `halovae dataset encode`, and by the usual script: a loop over PyAV and diffusers' VAE.

    python benchmarks/dataset.py [--family wan2.1] [--clips 40] [--size 64x64] [--frames 9] [--memory 50,500]

The encoder has its true size and seeded random weights, in fp32. The script is one process with all cores. Ray starts
on this host. Clips per second are those after the first result: the start of Ray and of its workers, each of which
imports PyTorch, is not in them, and neither is the script's loading of the VAE.

`--memory` encodes datasets of so many clips with a tiny encoder, and prints the most memory that the command and Ray's
processes took together, shared pages by share, without the object store's file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import psutil
import torch

from halovae.cli.common import parse_size
from halovae.demo.clips import make_clip, photographs
from halovae.io import latents as latents_file
from halovae.io import media
from halovae.models.architectures import random_vae


def write_clips(folder: Path, count: int, size: tuple[int, int], frames: int) -> None:
    """Write clips over photographs."""
    photos = photographs(("astronaut", "coffee", "rocket"))
    folder.mkdir(parents=True)
    for number in range(count):
        clip = make_clip(photos, frames, size[1], size[0], seed=number)
        sink = media.Sink(folder / f"{number:05d}.mp4", 16)
        sink.write(((clip + 1) * 127.5).round().to(torch.uint8))
        sink.close(whole=True)


def by_script(clips: Path, out: Path, model: Path, family: str) -> tuple[float, float]:
    """Encode as scripts do. Returns the seconds with and without loading the VAE."""
    from halovae.models.registry import families

    loads: Any = families()[family].cls
    out.mkdir()
    begin = time.perf_counter()
    vae = loads.from_pretrained(model).eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        for path in sorted(clips.glob("*.mp4")):
            with av.open(str(path)) as container:
                frames = [torch.from_numpy(one.to_ndarray(format="rgb24")) for one in container.decode(video=0)]
            pictures = torch.stack(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            latents = vae.encode(pictures).latent_dist.mode()
            torch.save(latents, out / f"{path.stem}.pt")
    end = time.perf_counter()
    return end - begin, end - loaded


def by_halovae(clips: Path, out: Path, model: Path) -> tuple[float, float, float, str]:
    """Encode by the command. Returns its seconds, clips per second, the most bytes of its processes, and its report."""
    command = ["-m", "halovae.cli.main", "dataset", "encode", str(clips), "-o", str(out), "--model", str(model)]
    command += ["--batch-size", "1"]
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    manifest, most = out / "manifest.jsonl", 0.0
    seen: list[tuple[float, int]] = []
    while process.poll() is None:
        most = max(most, held(process.pid))
        count = manifest.read_bytes().count(b"\n") if manifest.exists() else 0
        if count and (not seen or count > seen[-1][1]):
            seen.append((time.perf_counter(), count))
        time.sleep(0.5)
    seconds = time.perf_counter() - begin
    said = " ".join((process.stdout.read() if process.stdout else "").split())
    if process.returncode or len(seen) < 2:
        raise RuntimeError(f"halovae dataset encode failed, or made all clips at once: {said}")
    (first, before), (last, after) = seen[0], seen[-1]  # several results come at once
    return seconds, (after - before) / (last - first), most, said


def held(pid: int) -> float:
    """The bytes that a process and its descendants hold."""
    try:
        family = (process := psutil.Process(pid), *process.children(recursive=True))
        return sum(part.pss for one in family for part in one.memory_maps() if "plasma" not in part.path)
    except psutil.Error:
        return 0.0


def worst(out: Path, other: Path) -> float:
    """The largest difference between what the two wrote."""
    return max(
        (torch.load(path) - latents_file.read(out / f"{path.stem}.mp4.00000.safetensors")).abs().max().item()
        for path in other.glob("*.pt")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="wan2.1")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--size", default="64x64", type=parse_size, help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--memory", help="numbers of clips, comma-separated, to measure memory instead of speed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        model = home / "model"
        random_vae(args.family, 8 if args.memory else None).save_pretrained(model)
        if args.memory:
            print("| clips | most memory (MiB) |\n| --- | --- |")
            for count in map(int, args.memory.split(",")):
                write_clips(home / f"in{count}", count, args.size, args.frames)
                *_, most, _ = by_halovae(home / f"in{count}", home / f"out{count}", model)
                print(f"| {count} | {most / 2**20:,.0f} |", flush=True)
            return
        write_clips(home / "in", args.clips, args.size, args.frames)
        whole, steady = by_script(home / "in", home / "script", model, args.family)
        print(f"script: {whole:.1f} s, {args.clips / steady:.3f} clips/s", flush=True)
        seconds, rate, _, said = by_halovae(home / "in", home / "out", model)
        print(f"{args.family}, {args.clips} clips of {args.frames} frames, {args.size[0]}x{args.size[1]}, fp32")
        print("| way | seconds | clips/s |\n| --- | --- | --- |")
        print(f"| script | {whole:.1f} | {args.clips / steady:.3f} |\n| halovae | {seconds:.1f} | {rate:.3f} |")
        print(f"ratio of clips/s {rate * steady / args.clips:.2f}; of all seconds {whole / seconds:.2f}")
        print(f"largest difference of latents {worst(home / 'out', home / 'script'):.1e}; load {psutil.getloadavg()}")
        print(said)


if __name__ == "__main__":
    main()
