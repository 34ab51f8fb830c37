"""Encode the videos of a folder to latents within a pipeline of Ray Data.

    python examples/encode_dataset.py --model path/to/vae --videos clips --output latents

For datasets that take hours, `halovae dataset encode` does the same, and goes on where it was ended.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray

import halovae.ray
from halovae.io.media import read_clip


def read(row: dict[str, Any]) -> dict[str, Any]:
    frames, _ = read_clip(Path(row["path"]), frames=17)
    return {**row, "frames": frames.permute(1, 2, 3, 0).numpy()}  # [T, H, W, 3], uint8


def to_bytes(row: dict[str, Any]) -> dict[str, Any]:
    latents = np.asarray(row.pop("latents"))
    return {**row, "latents": latents.tobytes(), "shape": list(latents.shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a VAE's folder, file, or hub id")
    parser.add_argument("--videos", type=Path, required=True, help="folder of mp4 files")
    parser.add_argument("--output", required=True, help="folder for parquet files")
    parser.add_argument("--gpus", type=int, default=0, help="actors with one GPU each; 0 for one on the CPU")
    args = parser.parse_args()

    paths = [{"path": str(path)} for path in sorted(args.videos.glob("*.mp4"))]
    latents = ray.data.from_items(paths).map(read).map_batches(
        halovae.ray.Encode,
        fn_constructor_kwargs={"model": args.model, "normalize": True},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=max(1, args.gpus)),
        num_gpus=1 if args.gpus else 0,
    )  # fmt: skip
    latents.map(to_bytes).write_parquet(args.output)


if __name__ == "__main__":
    main()
