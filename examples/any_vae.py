"""Decode with any diffusers VAE on a grid of ranks, unmodified, and compare with one process.

    torchrun --nproc-per-node 4 examples/any_vae.py --model flux --grid 2x2

The VAE has its true size and random weights (the same on all ranks); `--model` also takes a folder or hub id. Rank 0
prints the error, the times, and the live bytes of each rank and of a decode on one rank.
"""

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist

import halovae
from halovae.device.kinds import Device
from halovae.device.memory import LiveBytes
from halovae.distributed import transport

FLUX = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", help="flux, or a folder or hub id of a diffusers VAE")
    parser.add_argument("--grid", default="2x2", type=halovae.Grid.parse, help="ROWSxCOLS")
    parser.add_argument("--latent", default="64x64", help="HEIGHTxWIDTH in latent cells")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    height, width = map(int, args.latent.split("x"))

    device = Device.default().torch_device
    transport.join_world(device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    vae = _vae(args.model, getattr(torch, args.dtype)).to(device).eval().requires_grad_(False)
    # Channels last: CPUs without bf16 arithmetic take 40 times as long for other bf16 convolutions.
    vae.to(memory_format=torch.channels_last)
    latents = torch.randn(1, vae.config.latent_channels, height, width, device=device, dtype=vae.dtype)
    latents = latents.to(memory_format=torch.channels_last)
    decode = halovae.shard(lambda z: vae.decode(z, return_dict=False)[0], vae)

    own = LiveBytes()
    with own:
        frames = decode(latents, grid=args.grid, gather="rank0")
    assert decode.report is not None
    report = decode.report
    peaks: list[int] = [own.peak] * args.grid.size
    if args.grid.size > 1:
        dist.all_gather_object(peaks, own.peak)
    # One process with the same threads: rank 0 decodes while the others wait.
    if rank == 0:
        live = LiveBytes()
        begin = time.perf_counter()
        with torch.no_grad(), live:
            expected = vae.decode(latents, return_dict=False)[0]
        one_rank = time.perf_counter() - begin
        assert frames is not None
        error = (frames.double() - expected.double()).abs().max().item() / expected.abs().max().item()
        print(
            f"grid {args.grid}, {'recorded' if not report.eager else report.eager}, fallbacks {dict(report.fallbacks)}"
        )
        print(f"largest error / largest value: {error:.2g}")
        print(f"seconds: {report.seconds:.2f} on {args.grid.size} ranks, {one_rank:.2f} on one")
        print(f"messages sent by rank 0: {report.messages}, {report.bytes_sent / 2**20:.1f} MiB")
        shares = ", ".join(f"{peak / 2**20:.0f}" for peak in peaks)
        print(f"peak live MiB: {shares} by rank, {live.peak / 2**20:.0f} on one: {max(peaks) / live.peak:.3f} of it")
    if args.grid.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _vae(model: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return (
        AutoencoderKL(**FLUX).to(dtype) if model == "flux" else AutoencoderKL.from_pretrained(model, torch_dtype=dtype)
    )


if __name__ == "__main__":
    main()
