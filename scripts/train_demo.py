"""Train the demo model: a small Wan-architecture VAE, on clips that `halovae.demo.clips` makes.

    python scripts/train_demo.py --out src/halovae/demo/vae

Two cores take about 40 minutes. The last line printed is the PSNR on held-out clips, over photographs never trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from halovae.demo.clips import HELD_OUT, TRAINING, make_clip, photographs

# A decoder twice as wide as the encoder, one residual block fewer per level: 3.6 MB in fp16.
CONFIG = {"base_dim": 8, "decoder_base_dim": 16, "num_res_blocks": 1, "z_dim": 16}
HELD_OUT_SEEDS = range(10_000_000, 10_000_008)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of tensors in [-1, 1] (peak-to-peak 2)."""
    return 10 * math.log10(4 / F.mse_loss(a, b).item())


@torch.inference_mode()
def evaluate(vae: AutoencoderKLWan, frames: int = 17, height: int = 128, width: int = 160) -> list[float]:
    """PSNR of each held-out clip, encoded to the posterior's mode and decoded again."""
    photos = photographs(HELD_OUT)
    scores = []
    for seed in HELD_OUT_SEEDS:
        clip = make_clip(photos, frames, height, width, seed)[None]
        scores.append(psnr(vae.decode(vae.encode(clip).latent_dist.mode()).sample, clip))
    return scores


def train(steps: int, batch: int, size: int, seed: int, rate: float) -> AutoencoderKLWan:
    """Train on single frames for an eighth of the steps, then on clips of three latent frames, the least in which a
    causal convolution of three taps sees three frames. Returns the average of the weights over the last steps."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():  # start with little posterior noise: the first steps would otherwise learn from noise alone
        vae.quant_conv.bias[CONFIG["z_dim"] :].fill_(-6.0)
    averaged = copy.deepcopy(vae).requires_grad_(False)
    photos = photographs(TRAINING)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    begin = time.monotonic()
    for step in range(steps):
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm * (0.02 + 0.98 * cosine)
        frames, count = (1, 6 * batch) if step < steps // 8 else (9, batch)
        clips = torch.stack([make_clip(photos, frames, size, size, seed + step * 1000 + i) for i in range(count)])
        posterior = vae.encode(clips).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded, clips) * 4 + F.l1_loss(decoded, clips) * 0.5 + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(averaged.parameters(), vae.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if (step + 1) % 100 == 0:
            held_out = evaluate(averaged, frames=9, height=64, width=64)
            print(
                f"step {step + 1} of {steps}, {(time.monotonic() - begin) / 60:.1f} min: "
                f"batch {psnr(decoded.detach(), clips):.2f} dB, held-out {sum(held_out) / len(held_out):.2f} dB",
                flush=True,
            )
    return averaged


@torch.inference_mode()
def with_latent_statistics(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Record the latents' mean and standard deviation per channel in the config, as Wan's checkpoints do."""
    photos = photographs(TRAINING)
    clips = torch.stack([make_clip(photos, 9, 64, 64, seed) for seed in range(64)])
    latents = vae.encode(clips).latent_dist.mode().transpose(0, 1).flatten(1)
    rounded = {
        "latents_mean": [round(v, 4) for v in latents.mean(1).tolist()],
        "latents_std": [round(v, 4) for v in latents.std(1).tolist()],
    }
    vae.register_to_config(**rounded)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write in diffusers layout")
    parser.add_argument("--steps", type=int, default=3200, help="training steps (default 3200)")
    parser.add_argument("--batch", type=int, default=2, help="clips of nine frames per step (default 2)")
    parser.add_argument("--size", type=int, default=64, help="clip height and width in pixels (default 64)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the clips (default 0)")
    args = parser.parse_args()
    begin = time.monotonic()
    vae = train(args.steps, args.batch, args.size, args.seed, args.rate)
    minutes = round((time.monotonic() - begin) / 60, 1)
    with_latent_statistics(vae).half().save_pretrained(args.out)
    scores = evaluate(AutoencoderKLWan.from_pretrained(args.out, torch_dtype=torch.float32))
    report = {"held_out_psnr_db": [round(s, 2) for s in scores], "mean_psnr_db": round(sum(scores) / len(scores), 2)}
    report |= {"steps": args.steps, "minutes": minutes, "seed": args.seed, "torch": torch.__version__}
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
