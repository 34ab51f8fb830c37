"""Lets all ranks share the `decode` and `encode` of a VAE within a pipeline's call."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from halovae.distributed.mesh import Mesh
from halovae.models.classes import tiles_only
from halovae.report import DecodeReport
from halovae.runtime.options import DecodeOptions, Sharing
from halovae.runtime.plane_call import PlaneCall
from halovae.runtime.vae import VAE


class SharedDecode:
    """Lets all ranks share the `decode` of a pipeline's VAE. Rank 0 receives the pictures, the others black ones.

    Args:
        vae: a diffusers autoencoder; its instance's `decode` is replaced.

    Attributes:
        options: arguments of `VAE.stream` for the next calls.
        report: of the last call, with all ranks; None before the first.
    """

    def __init__(self, vae: Any) -> None:
        self.options: DecodeOptions = {}
        self.report: DecodeReport | None = None
        autoencoder = VAE(vae)
        call = autoencoder.calls["decode"]
        if tiles_only(vae):
            vae.enable_tiling()

        @functools.wraps(type(vae).decode)
        def decode(_: nn.Module, z: Tensor, *args: Any, **kwargs: Any) -> Any:
            given, as_tuple = call.arguments(z, *args, **kwargs)
            # Pipelines pass latents in the transformer's dtype; the VAE's may be another.
            dtype = autoencoder.dtype
            given = {name: value.to(dtype) if _is_floating(value) else value for name, value in given.items()}
            options: DecodeOptions = {**self.options, "gather": "rank0", "module_kwargs": given}
            stream = autoencoder.stream(z, **options)
            sample = stream.join()
            self.report = stream.shared_report()
            return call.result(call.blank(stream.latents) if sample is None else sample, as_tuple)

        vars(decode)["halovae_method"] = True  # as in `replace_call`
        vars(vae)["decode"] = types.MethodType(decode, vae)


def share_encode(vae: Any, sharing: Sharing, mesh: Mesh) -> None:
    """Let all ranks share the `encode` of a pipeline's VAE, while another thread decodes. All receive the result.

    Args:
        vae: a diffusers autoencoder; its instance's `encode` is replaced.
        sharing: how ranks share it.
        mesh: a mesh of all ranks that nothing else uses.
    """
    call = PlaneCall(vae, "encode", mesh)

    @functools.wraps(type(vae).encode)
    def encode(_: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options, as_tuple = call.arguments(x, *args, **kwargs)
        x = x.to(next(vae.parameters()).dtype)  # pipelines pass pictures in the text encoder's dtype
        value = call.stream(x, call.choose(x, sharing, options), sharing, options).join()
        assert value is not None  # all ranks receive it
        return call.result(value, as_tuple)

    vars(encode)["halovae_method"] = True  # as in `replace_call`
    vars(vae)["encode"] = types.MethodType(encode, vae)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
