"""An encoder of pictures and clips, whose ranks share the rows where that is predicted to be faster."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from halovae.decode import Mode, check_choice
from halovae.geometry import Grid
from halovae.kernels import EAGER, Kernels
from halovae.lines import world_size
from halovae.loop import moments
from halovae.mesh import Mesh, mesh_for
from halovae.models.wan_encoder import WanEncoder
from halovae.planning.choose import WORTH
from halovae.planning.cost import walk_encoder
from halovae.planning.planner import calibration_of


class Encoder:
    """Encodes to the moments of latents, on one device or shared by all ranks, with the same result.

    On several ranks, every rank makes the same calls with the same pictures, and gets all of the result.

    Args:
        model: the weights.
        mesh: all ranks of the world, along the rows; None for the mesh that decodes with this grid use. A thread that
            encodes while another one decodes needs its own.
    """

    def __init__(self, model: WanEncoder, mesh: Mesh | None = None) -> None:
        self.model = model
        self._mesh = mesh
        self._alone = Mesh(Grid(), next(model.parameters()).device)
        self._pays: dict[tuple[int, ...], bool] = {}  # to share pictures of these shapes

    def encode(self, pictures: Tensor, *, mode: Mode = "auto", kernels: Kernels = EAGER) -> Tensor:
        """Encode pictures or clips.

        Args:
            pictures: `[B, 3, T, H, W]` in [-1, 1]; T = 1 is a picture. Frames after the last one of 1 + a multiple of
                `config.temporal_factor` are left out, as diffusers does.
            mode: "parallel": all ranks share the rows. "single": each rank encodes all by itself, without messages.
                "auto": the one that is predicted to be faster, from what was measured on this machine.
            kernels: eager, or compiled.

        Returns:
            `[B, 2 * z_dim, T', H', W']` on every rank: means, then logarithms of variances, as diffusers'
            `DiagonalGaussianDistribution` takes them.

        Raises:
            ValueError: pictures of a shape that the model does not take, more ranks than latent rows, or an unknown
                mode.
            TypeError: pictures that are not floating point.
            RuntimeError: another rank refused its arguments, or was given other ones.
        """
        config, dtype = self.model.config, next(self.model.parameters()).dtype
        everyone = self._mesh or mesh_for(Grid(rows=world_size()), self._alone.platform.device)
        error: Exception | None = None
        try:
            check_choice("mode", mode, get_args(Mode))
            self._check(pictures, everyone.grid if mode == "parallel" else Grid())
        except (ValueError, TypeError) as refused:
            error = refused
        hosts = everyone.agree(f"encode {list(pictures.shape)}, mode {mode}, {dtype}", error, socket.gethostname())
        pictures = pictures[:, :, : pictures.shape[2] - (pictures.shape[2] - 1) % config.temporal_factor]
        if mode == "auto" and pictures.shape not in self._pays:
            several = len(set(hosts)) > 1
            self._pays[pictures.shape] = self._is_faster_shared(pictures.shape, everyone, several, kernels)
        shared = mode == "parallel" or (mode == "auto" and self._pays[pictures.shape])
        mesh = everyone if shared else self._alone
        own = torch.cat(list(moments(self.model, pictures, mesh, kernels)), dim=2).contiguous()
        if mesh.alone:
            return own
        batch, _, _, height, width = pictures.shape
        rows, cols = (extent // config.spatial_factor for extent in (height, width))
        whole = own.new_empty(batch, own.shape[1], own.shape[2], rows, cols)
        mesh.gather_frames(own, mesh.grid.shards(batch, rows, cols), whole, everyone=True)
        return whole

    def _check(self, pictures: Tensor, grid: Grid) -> None:
        config, shape = self.model.config, pictures.shape
        factor = config.spatial_factor
        expected = f"[B, {config.picture_channels}, T, H, W] for {config.family}, H and W multiples of {factor}"
        if len(shape) != 5 or shape[1] != config.picture_channels or min(shape) < 1:
            raise ValueError(f"pictures of shape {list(shape)}: expected {expected}, none of them 0")
        if shape[3] % factor or shape[4] % factor:
            raise ValueError(f"pictures of {shape[4]}x{shape[3]}: expected {expected}")
        if not pictures.dtype.is_floating_point:
            raise TypeError(f"pictures of dtype {pictures.dtype}; expected a floating dtype, in [-1, 1]")
        grid.shards(shape[0], shape[3] // factor, shape[4] // factor)

    def _is_faster_shared(self, shape: Sequence[int], everyone: Mesh, hosts: bool, kernels: Kernels) -> bool:
        ranks, platform = everyone.grid.size, everyone.platform
        if not 1 < ranks <= shape[3] // self.model.config.spatial_factor:
            return False
        dtype = next(self.model.parameters()).dtype
        calibration = calibration_of(everyone, dtype, kernels)
        costs = [
            walk_encoder(self.model.config, shape, dtype, grid, kernels is not EAGER, platform.device)
            for grid in (Grid(), everyone.grid)
        ]
        # Both ways all ranks compute at the same time.
        alone, shared = (sum(calibration.seconds(cost, ranks, hosts).values()) for cost in costs)
        return shared < alone * (1 - WORTH)
