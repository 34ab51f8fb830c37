"""Exact decoding of diffusion latents on many devices at once.

import halovae
vae = halovae.load("path/to/vae")
frames = vae.decode(latents, grid=halovae.Grid(rows=2))  # under torchrun, on every rank
"""

from halovae.distributed.mesh import Mesh
from halovae.errors import CheckpointError, HalovaeError, MemoryBudgetError, RankError
from halovae.grid import Grid, Shard
from halovae.models.layouts import Layout
from halovae.models.registry import Family, Traits
from halovae.pipelines.diffusers import parallelize, restore
from halovae.pipelines.previews import Preview, previews
from halovae.plane import shard
from halovae.plane.steps import on_each_step
from halovae.runtime.vae import VAE, load

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "CheckpointError",
    "Family",
    "Grid",
    "HalovaeError",
    "Layout",
    "MemoryBudgetError",
    "Mesh",
    "Preview",
    "RankError",
    "Shard",
    "Traits",
    "load",
    "on_each_step",
    "parallelize",
    "previews",
    "restore",
    "shard",
]
