"""Exact decoding of diffusion latents on many devices at once.

import halovae
decoder = halovae.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
frames = decoder.decode(latents, grid=halovae.Grid(rows=2))  # under torchrun, on every rank
"""

from halovae.decode import Decoder, load
from halovae.geometry import Grid, Shard
from halovae.integrations.diffusers import parallelize, restore
from halovae.mesh import Mesh
from halovae.models.weights import CheckpointError
from halovae.plane import shard
from halovae.planning.plan import Plan

__version__ = "0.1.0"
__all__ = ["CheckpointError", "Decoder", "Grid", "Mesh", "Plan", "Shard", "load", "parallelize", "restore", "shard"]
