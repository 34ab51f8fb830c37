"""What an encoder takes, and which weights it has."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from halovae.models.load import CLASSES, find_model, read_class, read_config, read_diffusers_config
from halovae.models.registry import traits_of


@dataclass(frozen=True)
class Facts:
    """What the config of an autoencoder says.

    Attributes:
        family: the model's family, or the class of its VAE.
        revision: the commit of a hub model, else a checksum of the files.
        spatial: sides of pictures are multiples of it.
        temporal: frames per latent frame.
        first: frames of a clip are `first` (0 or 1) plus a multiple of `temporal`.
        clips: whether it is usual to encode clips; else pictures.
        framed: whether it takes `[B, C, T, H, W]`, also of pictures.
    """

    family: str
    revision: str
    spatial: int
    temporal: int
    first: int
    clips: bool
    framed: bool

    @classmethod
    def read(cls, path: Path) -> Facts:
        """Read them from a model's folder or file.

        Raises:
            ValueError: it has no encoder of pictures, or does not say how latents relate to pictures.
        """
        from halovae.models.architectures import meta_vae_of, temporal_ratio, usual_frames
        from halovae.models.classes import makes_clips, spatial_ratio, takes_frames

        name = read_class(path)
        module = meta_vae_of(read_diffusers_config(path), str(path), torch.float32)
        spatial = spatial_ratio(module)
        if traits_of(type(module)).batched or not hasattr(type(module), "encode"):
            raise ValueError(f"{path}: {name} cannot encode a dataset: expected an encoder of pictures or of clips")
        if spatial is None:
            raise ValueError(f"{path}: the config of {name} does not say how latents relate to pictures")
        family = read_config(path).family if name in CLASSES else name
        temporal, first = temporal_ratio(module) if makes_clips(module) else (1, 1)
        clips = usual_frames(module, 5) > 1
        return cls(family, revision_of(path), spatial, temporal, first, clips, takes_frames(module))

    def fits(self, frames: int) -> bool:
        """Whether clips can have so many frames."""
        return frames >= max(1, self.first) and (frames - self.first) % self.temporal == 0

    def longest(self, frames: int) -> int:
        """The most frames of a clip that are not more than `frames`; below 1 if there are too few."""
        return self.first + (frames - self.first) // self.temporal * self.temporal


def revision_of(model: str | Path) -> str:
    """The commit of a model from the hub; of other models, a checksum of config and weights."""
    path = find_model(model)
    commit = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", str(path))
    if commit:
        return commit[1]
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted((*path.glob("config.json"), *path.glob("*.safetensors"))):
        with file.open("rb") as content:
            found.update(checksum(content).encode())
    return f"sha256:{found.hexdigest()[:16]}"


def checksum(file: BinaryIO) -> str:
    """The SHA-256 of a file, from where it stands."""
    found = hashlib.sha256()
    while block := file.read(2**20):
        found.update(block)
    return found.hexdigest()
