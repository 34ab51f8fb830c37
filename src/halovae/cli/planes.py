"""Models on meta tensors: what their latents decode to, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halovae.cli.common import check_installed
from halovae.grid import Grid
from halovae.models.load import read_diffusers_config
from halovae.planning.graphs import Traced, traced


@dataclass(frozen=True)
class PlaneModel:
    """A diffusers autoencoder without data.

    Attributes:
        name: the name of its class.
        module: the autoencoder on meta tensors.
    """

    name: str
    module: nn.Module

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype) -> PlaneModel:
        """Read the config from a folder or a file.

        Raises:
            ValueError: it is not of an autoencoder that can be partitioned, or diffusers is not installed.
        """
        config = read_diffusers_config(path)
        name = str(config.get("_class_name"))
        check_installed(f"a VAE of class {name}", "diffusers")
        from halovae.models.architectures import meta_vae_of

        return cls(name, meta_vae_of(config, str(path), dtype))

    def traced(self, shape: Sequence[int], dtype: torch.dtype, grid: Grid) -> Traced:
        """Return what the rank with the most to do takes to decode latents of a shape.

        Raises:
            ValueError: the model cannot decode such latents.
        """
        from halovae.models import zoo
        from halovae.models.classes import latent_channels, takes_frames
        from halovae.models.registry import traits_of

        if traits_of(type(self.module)).batched:
            raise ValueError(f"{self.name} takes the frames of a clip as a batch: decode it in Python, by halovae.load")
        dims = "[B, C, T, H, W]" if takes_frames(self.module) else "[B, C, H, W]"
        channels = latent_channels(self.module)
        expected = f"{dims} with {channels} channels, each at least 1, for {self.name}"
        if len(shape) != dims.count(",") + 1 or min(shape) < 1 or channels not in (None, shape[1]):
            raise ValueError(f"latents of shape {list(shape)}; expected {expected}")
        grid.shards(shape[0], shape[-2], shape[-1])
        return traced(lambda z: zoo.decode(self.module, z), self.module, shape, dtype, grid)

    def clip(self, shape: Sequence[int], dtype: torch.dtype, grid: Grid) -> tuple[int, ...]:
        """Return the shape `[B, C, T', H', W']` that latents decode to. Pictures have one frame.

        Raises:
            ValueError: the model cannot decode such latents.
        """
        made = self.traced(shape, dtype, Grid()).pictures
        grid.shards(shape[0], shape[-2], shape[-1])
        if made[1] != 3:
            raise ValueError(f"{self.name} makes pictures of {made[1]} channels; only 3 (RGB) can be written")
        return made if len(made) == 5 else (*made[:2], 1, *made[2:])
