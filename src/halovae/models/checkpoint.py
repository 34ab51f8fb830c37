"""VAEs in single files: recognition by keys and shapes, and weights by diffusers' names.

A file holds a VAE in one of `registry.layouts()`, alone or among the weights of a whole pipeline. Only names and shapes
are read until all of them are known to match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halovae.errors import CheckpointError
from halovae.models.layouts import SCALINGS, Config, Layout, Scaling
from halovae.models.registry import layouts
from halovae.models.weights import Weights, dtype_names, some

# Prefixes of the VAE's keys: none; in files of a whole pipeline, ComfyUI's and Lightricks', or latent diffusion's.
PREFIXES = ("", "vae.", "first_stage_model.")
# Prefixes of keys for training: losses, and averages of weights that the file has elsewhere or not at all.
_UNUSED = ("loss.", "model_ema.")


@dataclass(frozen=True)
class Checkpoint:
    """A VAE's weights in files.

    Attributes:
        source: the file or folder, for messages.
        config: the config of the diffusers class `_class_name`.
        weights: the files' tensors.
        keys: maps diffusers' names to the name in the files and the shape in diffusers.
        layout: the layout of a single file; None for a folder, which has a `config.json`.
        prefix: the prefix of the VAE's keys.
    """

    source: str
    config: Config
    weights: Weights
    keys: Mapping[str, tuple[str, torch.Size]]
    layout: Layout | None = None
    prefix: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the VAE's weights as they are stored."""
        return sum(self.weights.stored[key].nbytes for key, _ in self.keys.values())

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what `halovae inspect` shows about the file, as pairs of label and text."""
        own = [self.weights.stored[key] for key, _ in self.keys.values()]
        if self.layout is not None:
            yield "file", f"{self.layout.family}, {self.layout.names_of} names"
        yield "stored as", dtype_names(own)
        if self.prefix or len(own) < len(self.weights.stored):
            others = len(self.weights.stored) - len(own)
            yield "beside the VAE", f"{others} tensors; its keys begin with {self.prefix!r}"
        if "scaling_factor" in self.config and self.layout is not None:
            used, possible = _scaling(self)
            doubt = f" (or {' or '.join(map(str, possible))}: the file does not say)" if possible else ""
            yield "scaling", f"{used}{doubt}"

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Check that weights, given by diffusers' names, are floating-point numbers.

        Raises:
            CheckpointError: one is not; the message names it.
        """
        for key, _ in (self.keys[name] for name in names):
            dtype = self.weights.stored[key].dtype
            if not dtype.is_floating_point and not key.endswith("num_batches_tracked"):
                raise CheckpointError(f"{self.source}: {key} is no floating-point number; expected fp32 to fp8")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights by diffusers' names, on the CPU in the stored dtype, as views of the file where possible.

        Raises:
            CheckpointError: the file cannot be read.
        """
        needed = {self.keys[name][0]: name for name in names}
        for key, tensor in self.weights.read(needed):
            yield needed[key], tensor.reshape(self.keys[needed[key]][1])


def recognize(path: Path) -> Checkpoint:
    """Recognize the VAE in a file by keys and shapes.

    Args:
        path: `.safetensors` or a file of `torch.save`; its name does not matter.

    Raises:
        CheckpointError: the file cannot be read, or has none of `registry.layouts()`; the message names the nearest
            layout and what differs.
    """
    with torch.inference_mode(False), torch.no_grad():  # so that views record their base tensor
        weights = Weights([path])
        layout, prefix = _layout_of(path, weights.stored)
        own = {
            key.removeprefix(prefix): tensor
            for key, tensor in weights.stored.items()
            if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_UNUSED)
        }
        try:
            named = layout.names(own)
            config = {"_class_name": layout.class_name, **layout.config(named)}
        except ImportError as error:
            needs = "needs pip install 'halovae[diffusers]'"
            raise CheckpointError(f"{path}: {layout.family} {needs} ({error})") from error
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{path}: has keys of {layout.family}, but others are missing or of unknown shapes ({error!r})"
            ) from error
        original = {id(tensor): prefix + key for key, tensor in own.items()}
        keys = {name: (original[id(one if one._base is None else one._base)], one.shape) for name, one in named.items()}
        for key, shape in keys.values():
            if weights.stored[key].numel() != shape.numel():
                raise CheckpointError(
                    f"{path}: {key} is {list(weights.stored[key].shape)}; {layout.family} has {list(shape)}, or with "
                    "dims of 1"
                )
    checkpoint = Checkpoint(str(path), config, weights, keys, layout, prefix)
    if "scaling_factor" in config:
        config.update(_scaling(checkpoint)[0].factors)
    return checkpoint


def _layout_of(path: Path, stored: Mapping[str, Tensor]) -> tuple[Layout, str]:
    """Return the layout with the longest signature that the file has, and the prefix of its keys."""
    matches = [
        (layout, prefix)
        for layout in layouts()
        for prefix in PREFIXES
        if all(prefix + key in stored for key in layout.signature)
    ]
    if not matches:
        raise CheckpointError(f"{path}: {_nearest(stored)}")
    return max(matches, key=lambda match: len(match[0].signature))


def check_weights(
    source: str, kind: str, needed: Mapping[str, torch.Size], given: Mapping[str, tuple[str, torch.Size]]
) -> None:
    """Check that weights match a module by name and shape.

    Args:
        source: the origin of the weights, for the message.
        kind: the kind of module, for the message.
        needed: maps the module's names to shapes.
        given: maps the same names to the name in `source` and the shape.

    Raises:
        CheckpointError: they do not match; the message lists missing and unexpected names, and shapes that differ.
    """
    missing = [name for name in needed if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [key for name, (key, _) in given.items() if name not in needed]
    misshapen = [
        f"{key} is {list(shape)}, not {list(needed[name])}"
        for name, (key, shape) in given.items()
        if name in needed and shape != needed[name]
    ]
    problems = [
        f"{label}: {some(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source}: not weights of {kind}; " + "; ".join(problems))


def _scaling(checkpoint: Checkpoint) -> tuple[Scaling, tuple[Scaling, ...]]:
    """Return the scaling that other keys of the file imply; if none do, the usual scaling and its alternatives."""
    known = SCALINGS.get(checkpoint.config["latent_channels"], SCALINGS[4])
    for scaling in known:
        if any(key.startswith(scaling.beside) for key in checkpoint.weights.stored):
            return scaling, ()
    return known[0], known[1:]


def _nearest(stored: Mapping[str, Tensor]) -> str:
    """Say why no layout matches: the nearest one, and the first keys that differ."""
    words = {word for key in stored for word in key.split(".")}

    def likeness(candidate: tuple[Layout, str]) -> tuple[int, float]:
        layout, prefix = candidate
        own = {word for key in layout.signature for word in key.split(".")}
        return sum(prefix + key in stored for key in layout.signature), len(own & words) / len(own)

    layout, prefix = max(((layout, prefix) for layout in layouts() for prefix in PREFIXES), key=likeness)
    lacks = [prefix + key for key in layout.signature if prefix + key not in stored]
    has = [key for key in sorted(stored) if key.removeprefix(prefix) not in layout.signature]
    known = "; ".join(dict.fromkeys(layout.family for layout in layouts()))
    return (
        f"no VAE of a known layout. The nearest is {layout.family} by {layout.names_of} names: "
        f"the file lacks {some(lacks, 3)}, and has {some(has, 3)}. "
        f"Expected a folder in diffusers layout, or a file of {known}"
    )
