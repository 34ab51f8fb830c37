"""An encoder for `map_batches` of Ray Data: pictures and clips in, latents out."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from halovae.device.kinds import Device
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import join_world
from halovae.errors import RankError
from halovae.models.classes import normalized, takes_frames
from halovae.runtime.vae import VAE, load

Store = Literal["mean", "sample", "both"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Encoded = tuple[np.ndarray, np.ndarray]  # latents, and standard deviations or nothing
Result = TypeVar("Result")
_NOTHING = np.zeros(0, np.float32)
_here: dict[tuple[str, str], VAE] = {}  # by model and dtype, in this process


class Encode:
    """Encodes the pictures or clips of a batch, those of one size at once.

    In Ray Data, each actor has one: `ds.map_batches(Encode, fn_constructor_kwargs={"model": ...}, batch_size=4,
    compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1)`.

    Args:
        model: a VAE's folder, file, or hub id, as for `halovae.load`; each host needs it.
        dtype: of computation, "fp32", "bf16", or "fp16".
        store: "mean", the most likely latents; "sample", latents drawn from the distribution; "both", the mean, and
            the standard deviation in a further column, so that a trainer can draw a new sample each time.
        normalize: whether latents are those of pipelines and trainers, by the config's mean and deviation or scaling;
            else they are as the VAE makes them.
        column: the batch's column with pictures: each `[T, H, W, 3]` or `[H, W, 3]`, uint8.
        output: the column for latents, which replaces it: each `[C, T, H, W]`, or `[C, H, W]` of a model of pictures,
            float32. With store="both", `output` + "_std" has their standard deviations.
        batch_size: how many are encoded at once.
        ranks: how many devices share one encode, for clips that are too large for one. Ray has to give the actor as
            many: `num_gpus=ranks`.
        seed: of samples. What is drawn also depends on the frames, but not on the batch.

    Raises:
        ValueError: an unknown dtype, store, or model.
    """

    def __init__(
        self, model: str | Path, *, dtype: str = "fp32", store: Store = "mean", normalize: bool = False,
        column: str = "frames", output: str = "latents", batch_size: int = 8, ranks: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        if store not in ("mean", "sample", "both"):
            raise ValueError(f"store={store!r}: expected 'mean', 'sample', or 'both'")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        self.store, self.normalize, self.column, self.output = store, normalize, column, output
        self.batch_size, self._seed, self._model, self._dtype = batch_size, seed, str(model), dtype
        self._size, self._ranks = ranks, Ranks(ranks) if ranks > 1 else None
        self._run(_load, self._model, dtype)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            batch: columns of equal length.

        Returns:
            The columns, with latents instead of pictures.

        Raises:
            ValueError: a picture has another shape or dtype.
            TypeError: samples are wanted, but the model makes no distribution.
        """
        batch = dict(batch)
        found = self.encode(list(batch.pop(self.column)))
        batch[self.output] = ragged([latents for latents, _ in found])
        if self.store == "both":
            batch[f"{self.output}_std"] = ragged([std for _, std in found])
        return batch

    def encode(self, pictures: Sequence[np.ndarray]) -> list[Encoded]:
        """Encode pictures or clips. Returns the latents of each, and their standard deviations, or nothing."""
        results: dict[int, Encoded] = {}
        for chosen in groups([one.shape for one in pictures], self.batch_size):
            made = self._encoded(np.stack([pictures[index] for index in chosen]))
            results |= dict(zip(chosen, made, strict=True))
        return [results[index] for index in range(len(pictures))]

    def _encoded(self, stack: np.ndarray) -> list[Encoded]:
        if stack.dtype != np.uint8 or stack.ndim not in (4, 5) or stack.shape[-1] != 3:
            raise ValueError(
                f"column {self.column!r}: {stack.dtype} of shape {list(stack.shape[1:])}; expected uint8 "
                "[T, H, W, 3] or [H, W, 3]"
            )
        return self._run(_encode, self._model, self._dtype, stack, self.store, self.normalize, self._seed)

    def _run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in this process, or on all ranks, which are started again if any has ended."""
        if self._size == 1:
            return function(*arguments)
        if self._ranks is None or not self._ranks.alive:
            self._ranks = Ranks(self._size)
        return self._ranks.run(function, *arguments)[0]


def _load(model: str, dtype: str) -> None:
    """Load a VAE once in this process."""
    if (model, dtype) not in _here:
        device = Device.default().torch_device
        join_world(device)
        _here[model, dtype] = load(model, dtype=DTYPES[dtype], device=device)


@torch.inference_mode()
def _encode(model: str, dtype: str, stack: np.ndarray, store: Store, normalize: bool, seed: int) -> list[Encoded]:
    """Encode `[B, T, H, W, 3]` or `[B, H, W, 3]`. Collective, if there are several ranks."""
    vae = _here[model, dtype]
    kind = type(vae.module).__name__
    clips = stack if stack.ndim == 5 else stack[:, None]
    pictures = torch.from_numpy(clips).to(vae.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    if not takes_frames(vae.module):
        if pictures.shape[2] != 1:
            raise ValueError(f"clips of {pictures.shape[2]} frames: {kind} encodes pictures, expected 1 frame")
        pictures = pictures[:, :, 0]
    moments = vae.encode(pictures.to(vae.dtype))
    assert moments is not None
    (held,) = vae.calls["encode"].result(moments, as_tuple=True) if vae.calls["encode"].kind[1] else (moments,)
    if isinstance(held, Tensor):
        if store != "mean":
            raise TypeError(f"store={store!r}: {kind} makes no distribution, expected store='mean'")
        means, spread = held.float(), None
    else:
        means, spread = held.mode().float(), held.std.float()
    if store == "sample":
        assert spread is not None
        seeds = [zlib.crc32(one.tobytes()) ^ seed for one in stack]
        noise = [torch.randn(means.shape[1:], generator=torch.Generator().manual_seed(one)) for one in seeds]
        means = means + spread * torch.stack(noise).to(means.device)
    if normalize:
        means = normalized(means, vae.config, kind)
        spread = None if spread is None else normalized(spread, vae.config, kind, spread=True)
    deviations = [_NOTHING] * len(means) if store != "both" or spread is None else spread.cpu().numpy()
    return list(zip(means.cpu().numpy(), deviations, strict=True))


class EncodeRows:
    """Encodes rows of `reading.read`. What cannot be encoded is rejected, and does not end the others.

    Args:
        dims: of latents without a batch: 4 of clips, 3 of pictures.
        options: of `Encode`.
    """

    def __init__(self, dims: int, **options: Any) -> None:
        self._encode = Encode(**options)
        self._nothing = np.zeros((1,) * dims, np.float32)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch: latents instead of frames, and the seconds that each took, as `encode_s`."""
        frames, reasons = batch["frames"], list(map(str, batch["reason"]))
        count, both = len(reasons), self._encode.store == "both"
        found: list[Encoded] = [(self._nothing, self._nothing)] * count
        seconds = [0.0] * count
        good = [index for index in range(count) if not reasons[index]]
        for chosen in groups([frames[index].shape for index in good], self._encode.batch_size):
            indices, begin = [good[one] for one in chosen], time.perf_counter()
            for index, made in zip(indices, self._made([frames[one] for one in indices]), strict=True):
                seconds[index] = (time.perf_counter() - begin) / len(indices)
                if isinstance(made, str):
                    reasons[index] = made
                elif not np.isfinite(made[0]).all():
                    reasons[index] = "latents hold NaN or infinite values: another dtype may help"
                else:
                    found[index] = made
        rows = {key: values for key, values in batch.items() if key != "frames"}
        rows |= {"reason": reasons, "encode_s": seconds, "latents": ragged([latents for latents, _ in found])}
        return {**rows, "latents_std": ragged([std for _, std in found])} if both else rows

    def _made(self, frames: Sequence[np.ndarray]) -> Sequence[Encoded | str]:
        """Encode what is alike: one by one, if memory does not suffice for all at once."""
        try:
            return self._encode.encode(frames)
        except Exception as error:
            cause = error.cause if isinstance(error, RankError) else error
            killed = isinstance(error, RankError) and error.killed
            if not killed and (cause is None or not is_out_of_memory(cause)):
                raise
            if len(frames) == 1:
                size = "x".join(map(str, frames[0].shape[:-1]))
                return [f"memory does not suffice to encode {size} (frames, rows, cols)"]
        return [one for frame in frames for one in self._made([frame])]


def groups(shapes: Sequence[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """The indices of those that are alike, at most so many together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault(tuple(shape), []).append(index)
    for indices in alike.values():
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


def ragged(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A column of arrays, whose shapes may differ."""
    column = np.empty(len(arrays), object)
    for index, one in enumerate(arrays):
        column[index] = one
    return column
