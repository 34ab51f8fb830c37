"""Peak memory of decodes of ever longer clips that stream to a file. It must not grow with the length.

    python benchmarks/streaming.py

The demo model decodes latents of 24 x 32 (pictures of 192 x 256) chunk by chunk into an mp4. For comparison, the same
decode holds all frames in memory. Each decode has a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from halovae import load
from halovae.device.kinds import Device
from halovae.device.memory import MemoryMeter
from halovae.distributed.ranks import Ranks
from halovae.io import media
from halovae.models.architectures import DEMO


def peak(frames: int, stream: bool) -> int:
    """Return the peak in bytes above the resting process."""
    decoder = load(DEMO, device="cpu")
    latents = torch.randn(1, 16, frames, 24, 32, generator=torch.Generator().manual_seed(0))
    decoder.decode(latents[:, :, :2, :4, :4])  # loads or makes what only the first decode does
    with tempfile.TemporaryDirectory() as folder:
        warm = media.Sink(Path(folder) / "warm.mp4", 16)
        warm.write(torch.zeros(3, 40, 192, 256, dtype=torch.uint8))  # fills the encoder's look-ahead
        warm.close(whole=True)
        memory = MemoryMeter(Device(decoder.device))
        if stream:
            sink = media.Sink(Path(folder) / "clip.mp4", 16)
            for piece in decoder.stream(latents, dtype=torch.uint8):
                assert piece is not None
                sink.write(piece[0])
            sink.close(whole=True)
        else:
            decoder.decode(latents)
        return memory.read().above_resting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[3, 9, 27], help="latent frames (default 3 9 27)")
    args = parser.parse_args()
    table = Table(title="peak memory above the resting process (MiB), demo model, fp32", title_justify="left")
    for column in ("latent frames", "frames", "streamed to a file", "all frames held"):
        table.add_column(column, justify="right")
    for frames in args.frames:
        row = [str(frames), str(1 + 4 * (frames - 1))]
        for stream in (True, False):
            with Ranks(1, threads=2) as group:
                row.append(f"{group.run(peak, frames, stream)[0] / 2**20:.0f}")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
