"""Complete pipelines on random weights, a few megabytes each: for trying things without a checkpoint.

Diffusers layout and the true architectures, with fewer layers and channels. What comes out is noise.
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
"""All that can be made."""


def make_model(name: str, folder: Path) -> None:
    """Save a pipeline in diffusers layout.

    Args:
        name: one of `MODELS`.
        folder: where to; made if it is not there.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    MODELS[name]().save_pretrained(folder)
