"""Any diffusers autoencoder on a grid of ranks: its own `decode` and `encode`, unmodified, on a partitioned plane."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halovae.geometry import Grid
from halovae.lines import world_size
from halovae.plane import Sharded, ShardReport
from halovae.plane.sharded import Gather

Call = Literal["decode", "encode"]
Mode = Literal["auto", "single", "parallel"]
_FIELDS = ("sample", "latent_dist", "latent", "latents")  # of what diffusers' autoencoders return


class Autoencoder:
    """A diffusers autoencoder that decodes and encodes on all ranks, with one process's result.

    Weights are shared with the module, which stays as it is. Every rank makes the same calls with the same tensors.

    Args:
        vae: a diffusers autoencoder whose latents have a plane: `[B, C, H, W]` or `[B, C, T, H, W]`.

    Raises:
        TypeError: it has no `decode` or `encode`.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.module = vae
        self._calls = {name: _Call(vae, name) for name in ("decode", "encode") if hasattr(type(vae), name)}
        if not self._calls:
            raise TypeError(f"{type(vae).__name__} has neither decode nor encode: expected a diffusers autoencoder")

    @property
    def config(self) -> Any:
        """The module's own."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def report(self) -> ShardReport | None:
        """What the last decode took; None before the first."""
        return self._calls["decode"].report if "decode" in self._calls else None

    def decode(
        self,
        latents: Tensor,
        *,
        mode: Mode = "auto",
        grid: Grid | None = None,
        gather: Gather = "rank0",
        **options: Any,
    ) -> Tensor | None:
        """Decode latents to pictures.

        Args:
            latents: `[B, C, H, W]` or `[B, C, T, H, W]`, floating point, the same on all ranks.
            mode: "auto" and "parallel": all ranks share the rows, or the cols where there are too few rows. "single":
                each rank decodes all by itself.
            grid: how ranks share the latents, instead of `mode`.
            gather: who receives pictures: "rank0", "all" ranks, or "none": each rank keeps its own part.
            options: further arguments of the module's own `decode`, such as `temb` or `num_frames`.

        Returns:
            What the module's `decode` returns as `sample`; None on the ranks that receive nothing.

        Raises:
            ValueError: see `Sharded`.
            TypeError: latents without a plane.
            RuntimeError: another rank refused, or was given other arguments or weights.
        """
        return self._call("decode", latents, mode, grid, gather, options)

    def encode(
        self, pictures: Tensor, *, mode: Mode = "auto", grid: Grid | None = None, gather: Gather = "all", **options: Any
    ) -> Tensor | None:
        """Encode pictures or clips.

        Args:
            pictures: `[B, C, H, W]` or `[B, C, T, H, W]` as the module's `encode` takes them.
            mode: as for `decode`; likewise `grid`, `gather` and `options`.
            grid: instead of `mode`.
            gather: who receives the result.
            options: further arguments of the module's own `encode`.

        Returns:
            The parameters of the latents' distribution (means, then logarithms of variances) where the module makes
            one, else the latents.

        Raises:
            ValueError: see `Sharded`.
            TypeError: pictures without a plane.
            RuntimeError: another rank refused, or was given other arguments or weights.
        """
        return self._call("encode", pictures, mode, grid, gather, options)

    def _call(
        self, name: Call, x: Tensor, mode: Mode, grid: Grid | None, gather: Gather, options: dict[str, Any]
    ) -> Tensor | None:
        if name not in self._calls:
            raise TypeError(f"{type(self.module).__name__} has no {name}")
        return self._calls[name](x, grid_for(mode, grid, x), gather, options)[0]


def grid_for(mode: Mode, grid: Grid | None, x: Tensor) -> Grid:
    """The grid that a mode stands for.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("auto", "single", "parallel"):
        raise ValueError(f"mode={mode!r}: expected 'auto', 'single' or 'parallel'")
    world = world_size()
    if grid is not None:
        return grid
    if mode == "single" or world == 1:
        return Grid()
    height, width = x.shape[-2:] if x.ndim >= 2 else (0, 0)
    if height >= world or mode == "parallel":
        return Grid(rows=world)
    return Grid(cols=world) if width >= world else Grid()


class _Call:
    """One of an autoencoder's two calls, sharded."""

    def __init__(self, vae: nn.Module, name: Call) -> None:
        self._vae, self._name = vae, name
        self._own: Callable[..., Any] = getattr(type(vae), name)
        self._signature = inspect.signature(self._own)
        config = getattr(vae, "config", None)
        ratio = vars(vae).get("spatial_compression_ratio", getattr(config, "spatial_compression_ratio", None))
        levels = len(getattr(config, "block_out_channels", None) or (0,))
        multiple = int(ratio) if isinstance(ratio, (int, float)) else 2 ** (levels - 1)
        self._sharded = Sharded(self._run, [vae], multiple if name == "encode" else 1)
        # Of the result: its class, the field that counts, and the class of a distribution in there.
        self.kind: tuple[type, str, type | None] = (Tensor, "", None)

    @property
    def report(self) -> ShardReport | None:
        return self._sharded.report

    def __call__(self, x: Tensor, grid: Grid, gather: Gather, options: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """The result where it is wanted, and whether it was asked for as a tuple."""
        parameters = list(self._signature.parameters)
        bound = dict(self._signature.bind(self._vae, x, **options).arguments)
        as_tuple = not bound.pop("return_dict", True)
        rest = {**{name: value for name, value in bound.items() if name not in parameters[:2]}}
        rest |= rest.pop("kwargs", {})
        if not isinstance(x, Tensor) or x.ndim not in (4, 5):
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{type(self._vae).__name__}.{self._name} of {shape}: expected [B, C, H, W] or [B, C, T, H, W]; "
                "audio and other autoencoders without a plane of rows and cols cannot be partitioned"
            )
        tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
        static = {name: value for name, value in rest.items() if name not in tensors}
        with _whole(self._vae):
            full = self._sharded(
                x, *tensors.values(), grid=grid, gather=gather, options={**static, "_names": ",".join(tensors)}
            )
        return full, as_tuple

    def _run(self, x: Tensor, *tensors: Tensor, _names: str, **options: Any) -> Tensor:
        named = dict(zip(_names.split(","), tensors, strict=True)) if _names else {}
        result = self._own(self._vae, x, **named, **options)
        if isinstance(result, Tensor):
            self.kind = Tensor, "", None
            return result
        field = next((name for name in _FIELDS if getattr(result, name, None) is not None), None)
        if field is None:
            name, fields = f"{type(self._vae).__name__}.{self._name}", ", ".join(_FIELDS)
            raise TypeError(f"{name} returned {type(result).__name__}: expected one of {fields} in it")
        value = getattr(result, field)
        distribution = None
        if not isinstance(value, Tensor):
            distribution, value = type(value), value.parameters
        self.kind = type(result), field, distribution
        tensor: Tensor = value
        return tensor

    def result(self, value: Tensor, as_tuple: bool) -> Any:
        """What the module's own call returns."""
        cls, field, distribution = self.kind
        if not field:
            return value
        held = value if distribution is None else distribution(value)
        return (held,) if as_tuple else cls(**{field: held})

    def blank(self, x: Tensor) -> Tensor:
        """Black pictures of the result's shape: one number, seen from everywhere."""
        report = self.report
        assert report is not None
        return x.new_full((), -1).expand(report.shape)


def tiles_only(vae: nn.Module) -> bool:
    """Whether an autoencoder has no other way than tiles: diffusers' Allegro refuses to work without."""
    return type(vae).__name__ == "AutoencoderKLAllegro"


@contextmanager
def _whole(vae: nn.Module) -> Iterator[None]:
    """Let an autoencoder take its whole plane at once: ranks share the memory. Some know nothing but tiles."""
    flags = {name: vars(vae)[name] for name in ("use_tiling", "use_slicing") if vars(vae).get(name) is True}
    if tiles_only(vae):
        flags.pop("use_tiling", None)
    vars(vae).update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        vars(vae).update(flags)


def parallelize_plane(
    vae: nn.Module, mode: Mode, grid: Grid | None, gather: Gather, warn: Callable[[Any], None]
) -> None:
    """Replace the `decode` and `encode` of an autoencoder's instance; see `halovae.parallelize`."""
    from diffusers.utils.accelerate_utils import apply_forward_hook

    for name in ("decode", "encode"):
        if not hasattr(type(vae), name):
            continue
        call = _Call(vae, name)
        vars(vae)[name] = apply_forward_hook(_method(call, name, mode, grid, gather, warn)).__get__(vae)


def _method(
    call: _Call, name: Call, mode: Mode, grid: Grid | None, gather: Gather, warn: Callable[[Any], None]
) -> Callable[..., Any]:
    own = getattr(type(call._vae), name)

    @functools.wraps(own)
    def method(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        warn(self)
        bound = call._signature.bind(self, x, *args, **kwargs).arguments
        options = {key: value for key, value in list(bound.items())[2:] if key != "kwargs"} | bound.get("kwargs", {})
        wished = gather if name == "decode" else "all"
        chosen = grid_for(mode, grid if name == "decode" else None, x)
        used: _Call = call
        if self is not call._vae:  # a copy of the module, with weights of its own
            kept = vars(self).get(f"_halovae_{name}")
            used = kept if kept is not None and kept._vae is self else _Call(self, name)
            vars(self)[f"_halovae_{name}"] = used
        value, as_tuple = used(x, chosen, wished, options)
        return used.result(used.blank(x) if value is None else value, as_tuple)

    return method
