"""Components of tiny pipelines: a VAE of the zoo, a transformer or U-Net, a scheduler."""

from __future__ import annotations

from typing import Any

import torch

from halovae.models.zoo import ENTRIES, Entry, build


def vae(name: str, **scaling: Any) -> Any:
    """Build an autoencoder of the zoo, with `scaling_factor` or `shift_factor` of its latents added to its config."""
    made: Any = build(next(entry for entry in ENTRIES if entry.name == name))
    made.register_to_config(**scaling)
    return made


def vae_of(cls: str, **config: Any) -> Any:
    """Build an autoencoder with a ratio or channels that its pipeline requires, and that no entry of the zoo has."""
    return build(Entry(cls, lambda: made(cls, **config), None, None, 1))


def made(cls: str, **config: Any) -> Any:
    """Build a diffusers class with seeded random weights, in eval mode. All-zero weights get noise, so that layers
    which they gate have an effect.
    """
    import diffusers

    torch.manual_seed(0)
    module: Any = getattr(diffusers, cls)(**config)
    with torch.no_grad():
        for weight in module.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    return module.eval()


def flow(**config: Any) -> Any:
    """Build the flow matching scheduler."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
