"""Complete pipelines with random weights, a few megabytes each, for trials without a checkpoint.

They have diffusers layout and the true architectures, with fewer layers and channels. Their results are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from halovae.pipelines.tiny import images, videos, wan
from halovae.pipelines.tiny.text import TEXT_DIM
from halovae.pipelines.tiny.wan import transformer

__all__ = ["FAMILIES", "MODELS", "TEXT_DIM", "make_model", "transformer"]

FAMILIES: dict[str, Callable[[], Any]] = {**images.MODELS, **videos.MODELS}
"""By name: pipelines that decode within their own call."""
MODELS: dict[str, Callable[[], Any]] = {**wan.MODELS, **FAMILIES}
"""All pipelines that can be made."""


def make_model(name: str, folder: Path) -> None:
    """Save a pipeline in diffusers layout.

    Args:
        name: one of `MODELS`.
        folder: where to save it; created if it does not exist.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    MODELS[name]().save_pretrained(folder)
