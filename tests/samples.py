"""Small models of the true architecture, latents for them, and diffusers' decodes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from halovae.models.architectures import random_vae

FAMILIES = ("wan2.1", "wan2.2-5b", "qwen-image")
WIDTH = 8


@cache
def vae(family: str) -> Any:
    return random_vae(family, WIDTH)


def latents(family: str, frames: int = 3, height: int = 7, width: int = 6, batch: int = 1, seed: int = 0) -> Tensor:
    channels = 48 if family == "wan2.2-5b" else 16
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, frames, height, width, generator=generator)


def reference(family: str, z: Tensor) -> Tensor:
    """Diffusers' own untiled decode."""
    model = vae(family)  # built outside of inference mode, since it is cached
    with torch.inference_mode():
        frames: Tensor = model.decode(z).sample
    return frames
