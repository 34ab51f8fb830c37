"""A safety checker for tiny Cosmos pipelines, which diffusers does not load without one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class NoGuardrail(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Approves everything, since results of a tiny pipeline are noise.

    Published pipelines use NVIDIA's guardrail, from the package `cosmos_guardrail`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt is harmless."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Return the frames; None if they are harmful."""
        return frames
