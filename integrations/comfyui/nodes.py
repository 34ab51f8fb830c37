"""The nodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .budget import parse_budget
from .calls import decoded, encoded

_BUDGET = (
    "STRING",
    {
        "default": "",
        "tooltip": "Memory that may be taken besides the VAE's weights, such as 6GiB or 800 MB. "
        "Empty for what is free when the node begins.",
    },
)


class _WithinBudget:
    CATEGORY = "latent"

    @classmethod
    def VALIDATE_INPUTS(cls, memory_budget: str) -> bool | str:
        """Check the budget before anything runs. Return True, or what is wrong with it."""
        try:
            parse_budget(memory_budget)
        except ValueError as error:
            return str(error)
        return True


class VAEDecodeExact(_WithinBudget):
    """Decodes latents to pictures."""

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded picture, or all frames of the clip.",)
    FUNCTION = "decode"
    DESCRIPTION = (
        "Decodes latents in the memory there is, exactly: if they do not fit at once, in as few strips as fit. "
        "There are no tiles, and so no seams. VAEs that cannot be recorded are decoded by ComfyUI; the log says why."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latents to decode."}),
                "vae": ("VAE", {"tooltip": "The VAE; its weights are shared, not copied."}),
                "memory_budget": _BUDGET,
            }
        }

    def decode(self, samples: dict[str, Any], vae: Any, memory_budget: str = "") -> tuple[Tensor]:
        latents: Tensor = samples["samples"]
        if latents.is_nested:
            latents = latents.unbind()[0]
        images = decoded(vae, latents, parse_budget(memory_budget))
        return (images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images,)  # the frames of all clips


class VAEEncodeExact(_WithinBudget):
    """Encodes pictures to latents."""

    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latents.",)
    FUNCTION = "encode"
    DESCRIPTION = (
        "Encodes pictures or a clip exactly, by a recorded graph, which takes less memory than ComfyUI's own encode of "
        "most VAEs; in strips, if they do not fit at once. VAEs that cannot be recorded are encoded by ComfyUI; the "
        "log says why."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pixels": ("IMAGE", {"tooltip": "The pictures, or the frames of one clip."}),
                "vae": ("VAE", {"tooltip": "The VAE; its weights are shared, not copied."}),
                "memory_budget": _BUDGET,
            }
        }

    def encode(self, pixels: Tensor, vae: Any, memory_budget: str = "") -> tuple[dict[str, Tensor]]:
        return ({"samples": encoded(vae, pixels, parse_budget(memory_budget))},)
