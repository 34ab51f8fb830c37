"""Exact decoding of diffusion latents on many devices at once.

import halovae
vae = halovae.load("path/to/vae")
frames = vae.decode(latents, grid=halovae.Grid(rows=2))  # under torchrun, on every rank
"""

from halovae.distributed.mesh import Mesh
from halovae.errors import CheckpointError, HalovaeError, MemoryBudgetError, RankError
from halovae.grid import Grid, Shard
from halovae.pipelines.diffusers import parallelize, restore
from halovae.pipelines.previews import Preview, previews
from halovae.plane import shard
from halovae.runtime.vae import VAE, load

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "CheckpointError",
    "Grid",
    "HalovaeError",
    "MemoryBudgetError",
    "Mesh",
    "Preview",
    "RankError",
    "Shard",
    "load",
    "parallelize",
    "previews",
    "restore",
    "shard",
]
