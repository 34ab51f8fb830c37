"""A VAE's `decode` shared by all ranks wherever a pipeline calls it, with a report of what it took."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import Tensor, nn

from halovae.integrations.autoencoder import Autoencoder, tiles_only
from halovae.report import DecodeReport


class SharedDecode:
    """Lets all ranks share the `decode` of a pipeline's VAE. Rank 0 receives the pictures, the others black ones.

    Args:
        vae: a diffusers autoencoder; its instance's `decode` is replaced.

    Attributes:
        options: of `Autoencoder.stream`, for the calls to come.
        report: of the last call, with all ranks; None before the first.
    """

    def __init__(self, vae: Any) -> None:
        self.options: dict[str, Any] = {}
        self.report: DecodeReport | None = None
        self._autoencoder = Autoencoder(vae)
        if tiles_only(vae):
            vae.enable_tiling()
        own = type(vae).decode
        signature = inspect.signature(own)

        @functools.wraps(own)
        def decode(module: nn.Module, z: Tensor, *args: Any, **kwargs: Any) -> Any:
            from diffusers.models.autoencoders.vae import DecoderOutput

            given = dict(list(signature.bind(module, z, *args, **kwargs).arguments.items())[2:])
            given |= given.pop("kwargs", {})
            as_tuple = not given.pop("return_dict", True)
            sample = self._decode(z, given)
            return (sample,) if as_tuple else DecoderOutput(sample=sample)

        vars(vae)["decode"] = types.MethodType(decode, vae)

    def _decode(self, z: Tensor, given: dict[str, Any]) -> Tensor:
        # Pipelines hand over what the transformer's dtype is; the VAE's may be another.
        dtype = self._autoencoder.dtype
        z = z.to(dtype)
        given = {name: value.to(dtype) if _is_floating(value) else value for name, value in given.items()}
        stream = self._autoencoder.stream(z, gather="rank0", **self.options, **given)
        sample = stream.join()
        self.report = stream.shared_report()
        if sample is None:
            taken = self._autoencoder.report
            assert taken is not None
            sample = z.new_full((), -1).expand(taken.shape)  # one number, seen from everywhere
        return sample


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
