"""Text to image with diffusers' QwenImagePipeline, its VAE decoding on all ranks.

    torchrun --nproc-per-node 2 examples/qwen_image.py --prompt "a cat on a roof" -o cat.png

Every rank runs the same pipeline with the same seed, and decodes its shard of the picture; rank 0 writes the picture.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import QwenImagePipeline
from PIL import Image

import halovae
from halovae.device.kinds import Device
from halovae.distributed import transport
from halovae.io import media


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen-Image", help="folder or hub id")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", default="1328x1328", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compare", action="store_true", help="decode with diffusers too, and print the difference")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"))
    args = parser.parse_args()
    media.check_output(args.output, 1)
    width, height = map(int, args.size.split("x"))

    device = Device.default().torch_device
    transport.join_world(device)
    pipe = QwenImagePipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(device)

    def generate() -> Any:
        return pipe(
            args.prompt, height=height, width=width, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images[0]  # fmt: skip

    expected = generate() if args.compare else None
    halovae.parallelize(pipe, gather="rank0")
    picture = generate()
    if transport.world_size() == 1 or dist.get_rank() == 0:
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(args.output)
        print(f"wrote {args.output}")
        if expected is not None:
            print(f"largest difference to diffusers: {np.abs(picture - expected).max():.1e} of 1")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
