"""Train the demo model, a small Wan-architecture VAE, on clips that `halovae.demo.clips` makes.

    python scripts/train_demo.py --out src/halovae/models/demo

Two cores take about 45 minutes, the first stage 36 of them. The last line printed is the PSNR on held-out clips, over
photographs that were never trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
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
    """Return the peak signal-to-noise ratio in dB of tensors in [-1, 1] (peak-to-peak 2)."""
    return 10 * math.log10(4 / F.mse_loss(a, b).item())


@torch.inference_mode()
def evaluate(vae: AutoencoderKLWan, frames: int = 17, height: int = 128, width: int = 160) -> list[float]:
    """Return the PSNR of each held-out clip, encoded to the posterior's mode and decoded again."""
    photos = photographs(HELD_OUT)
    scores = []
    for seed in HELD_OUT_SEEDS:
        clip = make_clip(photos, frames, height, width, seed)[None]
        scores.append(psnr(vae.decode(vae.encode(clip).latent_dist.mode()).sample, clip))
    return scores


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer: `steps` steps on `clips` clips of `frames` frames, `size` pixels square.

    The learning rate rises to `rate` over 100 steps and falls along a cosine to 2 % of it. The first `images` steps use
    single frames, six times as many as clips.
    """

    steps: int
    clips: int
    frames: int
    size: int
    rate: float
    images: int = 0


# The first stage trains space, and motion over three latent frames: a causal convolution of three taps needs three to
# see real frames only. The second trains long clips, because the convolutions together see much further back.
STAGES = (
    Stage(steps=3200, clips=2, frames=9, size=64, rate=2e-3, images=400),
    Stage(steps=400, clips=1, frames=33, size=48, rate=1e-3),
)


def train(vae: AutoencoderKLWan, stage: Stage, photos: list[Tensor], seed: int) -> AutoencoderKLWan:
    """Train in place, and return the average of the weights over the last steps."""
    averaged = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    begin = time.monotonic()
    for step in range(stage.steps):
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        optimizer.param_groups[0]["lr"] = stage.rate * warm * (0.02 + 0.98 * cosine)
        frames, count = (1, 6 * stage.clips) if step < stage.images else (stage.frames, stage.clips)
        seeds = range(seed + step * 1000, seed + step * 1000 + count)
        clips = torch.stack([make_clip(photos, frames, stage.size, stage.size, one) for one in seeds])
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
            held_out = evaluate(averaged, frames=stage.frames, height=64, width=64)
            print(
                f"step {step + 1} of {stage.steps}, {(time.monotonic() - begin) / 60:.1f} min: "
                f"batch {psnr(decoded.detach(), clips):.2f} dB, held-out {sum(held_out) / len(held_out):.2f} dB",
                flush=True,
            )
    return averaged.requires_grad_(True)


@torch.inference_mode()
def record_latent_statistics(vae: AutoencoderKLWan, photos: list[Tensor]) -> None:
    """Record the latents' mean and standard deviation per channel in the config, as Wan's checkpoints do."""
    clips = torch.stack([make_clip(photos, 9, 64, 64, seed) for seed in range(64)])
    latents = vae.encode(clips).latent_dist.mode().transpose(0, 1).flatten(1)
    rounded = {
        "latents_mean": [round(v, 4) for v in latents.mean(1).tolist()],
        "latents_std": [round(v, 4) for v in latents.std(1).tolist()],
    }
    vae.register_to_config(**rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write in diffusers layout")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the clips (default 0)")
    parser.add_argument("--resume", type=Path, help="folder with the model as it was after the first stage")
    args = parser.parse_args()
    begin, photos = time.monotonic(), photographs(TRAINING)
    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan(**CONFIG)
    if args.resume is None:
        # Start with little posterior noise: the first steps would otherwise learn from noise only.
        with torch.no_grad():
            vae.quant_conv.bias[CONFIG["z_dim"] :].fill_(-6.0)
    else:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(args.resume, torch_dtype=torch.float32).state_dict())
    for stage in STAGES if args.resume is None else STAGES[1:]:
        vae = train(vae, stage, photos, args.seed)
        record_latent_statistics(vae, photos)
        copy.deepcopy(vae).half().save_pretrained(args.out)
    minutes = round((time.monotonic() - begin) / 60, 1)
    scores = evaluate(AutoencoderKLWan.from_pretrained(args.out, torch_dtype=torch.float32))
    report = {"held_out_psnr_db": [round(s, 2) for s in scores], "mean_psnr_db": round(sum(scores) / len(scores), 2)}
    report |= {"minutes": minutes, "seed": args.seed, "torch": torch.__version__}
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
