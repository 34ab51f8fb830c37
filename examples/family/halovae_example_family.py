"""A family of autoencoders in a package of its own: `pip install examples/family`, and halovae knows it by name.

    halovae plan --model example --size 512x512 --num-gpus 1,2,4
    halovae decode latents.safetensors --model a-folder-or-file --num-gpus 2 -o picture.png

The class is written as for one device. It needs diffusers' `ModelMixin` and `ConfigMixin`, so that it loads from
folders with a `config.json`. A `Layout` says how single files name its weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from halovae import Family, Layout, Traits


class ExampleVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An autoencoder of pictures: 4 x 4 pixels for each latent cell."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_width: int = 8, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 2, stride=2), nn.SiLU(),
            nn.Conv2d(width, latent_width, 2, stride=2),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(),
            nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(),
            nn.Upsample(scale_factor=2.0), nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents `[B, latent_width, H, W]` to pictures `[B, 3, 4 * H, 4 * W]` in -1..1."""
        sample = torch.tanh(self.decoder(z))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode pictures `[B, 3, H, W]` in -1..1 to latents `[B, latent_width, H / 4, W / 4]`."""
        return self.encoder(x)


def _names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors by the class's names: the project's own files say `dec` and `enc`."""
    return {key.replace("enc.", "encoder.").replace("dec.", "decoder."): one for key, one in tensors.items()}


def _config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, latent_width = tensors["decoder.0.weight"].shape[:2]
    return {"latent_width": latent_width, "width": width}


FAMILY = Family(
    "example",
    "halovae_example_family:ExampleVAE",
    traits=Traits(spatial=4, channels=8),
    layouts=(
        Layout("Example", "its own", "ExampleVAE", ("dec.0.weight", "dec.1.weight", "enc.0.weight"), _names, _config),
    ),
)
