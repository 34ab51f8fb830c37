"""Text to video with diffusers' WanPipeline, its VAE decoding on all ranks.

    torchrun --nproc-per-node 2 examples/wan_text_to_video.py --prompt "a cat on a roof" -o cat.mp4

Every rank runs the same pipeline with the same seed (the transformer is not shared here), and decodes its shard of the
clip; rank 0 writes the clip.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import WanPipeline

import halovae
from halovae.device.kinds import Device
from halovae.distributed import transport
from halovae.io import media


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16", help="of the transformer; the VAE decodes in float32")
    parser.add_argument("--compare", action="store_true", help="decode with diffusers too, and print the difference")
    parser.add_argument("-o", "--output", type=Path, default=Path("clip.mp4"))
    args = parser.parse_args()
    media.check_output(args.output, args.frames)
    width, height = map(int, args.size.split("x"))

    device = Device.default().torch_device
    transport.join_world(device)
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(device)
    pipe.vae.to(torch.float32)

    def generate() -> Any:
        return pipe(
            args.prompt, height=height, width=width, num_frames=args.frames, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames[0]  # fmt: skip

    expected = generate() if args.compare else None
    halovae.parallelize(pipe, gather="rank0")
    frames = generate()
    if transport.world_size() == 1 or dist.get_rank() == 0:
        sink = media.Sink(args.output, fps=16)
        sink.write(torch.from_numpy(frames * 255).round().to(torch.uint8).permute(3, 0, 1, 2))
        sink.close(whole=True)
        print(f"wrote {args.output}")
        if expected is not None:
            print(f"largest difference to diffusers: {np.abs(frames - expected).max():.1e} of 1")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
