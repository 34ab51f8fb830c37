"""What tiny pipelines are put together from: a VAE of the zoo, a transformer or U-Net, a scheduler."""

from __future__ import annotations

from typing import Any

import torch

from halovae.models.zoo import ENTRIES, Entry, build


def vae(name: str, **facts: Any) -> Any:
    """An autoencoder of the zoo, with facts about its latents in its config: `scaling_factor`, `shift_factor`, ..."""
    made: Any = build(next(entry for entry in ENTRIES if entry.name == name))
    made.register_to_config(**facts)
    return made


def vae_of(cls: str, **config: Any) -> Any:
    """An autoencoder for which the zoo has none of the ratio or channels that the pipeline insists on."""
    return build(Entry(cls, lambda: made(cls, **config), None, None, 1))


def made(cls: str, **config: Any) -> Any:
    """A class of diffusers on seeded random weights, in eval mode. Zeros are drawn anew: what they gate shall count."""
    import diffusers

    torch.manual_seed(0)
    module: Any = getattr(diffusers, cls)(**config)
    with torch.no_grad():
        for weight in module.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    return module.eval()


def flow(**config: Any) -> Any:
    """The flow matching scheduler."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
