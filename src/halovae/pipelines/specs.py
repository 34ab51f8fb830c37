"""Pipeline specs, read from a folder in diffusers layout: sizes, frames, and pictures that a pipeline starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from halovae.errors import CheckpointError, PromptError
from halovae.models.load import read_config, read_json
from halovae.pipelines.families import FAMILIES, Family

# Pipelines whose latents are decoded separately from their call: whether they make videos, and the least and largest
# numbers of pictures that they start from.
PIPELINES = {
    "WanPipeline": (True, 0, 0),
    "WanImageToVideoPipeline": (True, 1, 1),
    "QwenImagePipeline": (False, 0, 0),
    "QwenImageEditPipeline": (False, 1, 1),
    "QwenImageEditPlusPipeline": (False, 1, 3),
}


@dataclass(frozen=True)
class Prompt:
    """A request to a pipeline. None leaves a value to the pipeline.

    Attributes:
        text: the prompt.
        size: width and height in pixels.
        frames: of a video; 1 for a picture.
        steps: of denoising.
        seed: equal seeds give equal noise, on any number of ranks.
        negative: the negative prompt; with it, or with a guidance above 1, each step runs the transformer twice.
        guidance: the guidance scale: `guidance_scale` of most pipelines, `true_cfg_scale` of Qwen-Image.
        guidance_2: the same for the second transformer of Wan2.2-A14B.
        images: contents of picture files, to start from (the first frame of a video) or to edit.
    """

    text: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int = 50
    seed: int = 0
    negative: str | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Extents:
    """Possible values of a width, a height, or a number of frames: `least`, and from there in steps of `step`."""

    least: int
    step: int

    def fit(self, extent: int) -> int:
        """Return the largest possible value up to `extent`, or the least."""
        return self.least + max(0, extent - self.least) // self.step * self.step


@dataclass(frozen=True)
class Pipeline:
    """A pipeline spec: what a pipeline can make.

    Attributes:
        name: its class in diffusers.
        family: properties of the pipeline.
        widths, heights: possible sizes in pixels.
        lengths: possible numbers of frames.
        pictures: possible numbers of pictures to start from.
        two: whether it has a second transformer.
        whole: whether latents are decoded within the pipeline's own call, not separately.
        sharing: number of ranks that share the transformer's sequence; each needs a token.
    """

    name: str
    family: Family
    widths: Extents
    heights: Extents
    lengths: Extents
    pictures: range
    two: bool
    whole: bool
    sharing: int = 1

    @classmethod
    def read(cls, folder: Path) -> Pipeline:
        """Read the spec from a pipeline's folder.

        Raises:
            CheckpointError: the files are missing or damaged, or the pipeline is none of `PIPELINES` and `FAMILIES`.
        """
        index = read_json(folder / "model_index.json")
        name = str(index.get("_class_name"))
        if name not in {**PIPELINES, **FAMILIES}:
            names = ", ".join([*PIPELINES, *FAMILIES])
            raise CheckpointError(f"{folder}: pipeline {name!r} is not supported; supported are {names}")
        family = _by_vae(name, folder) if name in PIPELINES else FAMILIES[name]
        widths = heights = Extents(family.multiple, family.multiple)
        lengths = Extents(1, family.frame_step)
        if name == "AllegroPipeline":  # decodes tiles of one size, and nothing outside them
            tile = int(read_json(folder / "vae" / "config.json").get("sample_size", 320))
            widths, heights, lengths = Extents(tile, tile - 80), Extents(tile, tile - 120), Extents(24, 16)
        _, least, most = PIPELINES.get(name, (None, 0, 0))
        return cls(
            name=name,
            family=family,
            widths=widths,
            heights=heights,
            lengths=lengths,
            pictures=range(least, most + 1),
            two=any(index.get("transformer_2") or ()),
            whole=name in FAMILIES,
        )

    @property
    def makes_video(self) -> bool:
        """Whether a result can have more than one frame."""
        return self.family.frames > 1

    @property
    def step(self) -> int:
        """Sizes are multiples of this many pixels."""
        return self.family.multiple

    @property
    def fps(self) -> float:
        """Frames per second that the pipeline was trained for."""
        return self.family.fps

    def fitted(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the size and number of frames of the result: pipelines round both down.

        Raises:
            PromptError: the pipeline does not take this number of pictures or such an argument, or a value is out of
                range.
        """
        if len(prompt.images) not in self.pictures:
            takes = {range(1): "no pictures", range(1, 2): "one picture"}.get(self.pictures, "1 to 3 pictures")
            raise PromptError("images", f"{len(prompt.images)} pictures: {self.name} takes {takes} to start from")
        width, height = prompt.size or self.family.size
        frames = prompt.frames or self.family.frames
        if not self.makes_video and frames > 1:
            raise PromptError("frames", f"{frames} frames: {self.name} makes pictures, expected 1")
        if prompt.steps < 1:
            raise PromptError("steps", f"{prompt.steps} steps: expected 1 or more")
        if prompt.guidance_2 is not None and not self.two:
            raise PromptError("guidance_2", f"guidance_2 {prompt.guidance_2}: this model has no second transformer")
        if prompt.guidance is not None and not self.family.guidance:
            raise PromptError("guidance", f"guidance {prompt.guidance}: {self.name} takes none, expected nothing")
        if prompt.negative is not None and not self.family.negative:
            raise PromptError("negative", f"negative prompt {prompt.negative!r}: {self.name} takes none")
        if width < self.widths.least or height < self.heights.least:
            least = f"{self.widths.least}x{self.heights.least}"
            makes = f"multiples of {self.step}, from {least} on"
            if self.widths.least % self.widths.step:
                makes = f"{least} pixels, and {self.widths.step} more cols or {self.heights.step} more rows at a time"
            raise PromptError("size", f"size {width}x{height}: {self.name} makes {makes}")
        step, least_frames = self.lengths.step, self.lengths.least
        width, height = self.widths.fit(width), self.heights.fit(height)
        frames = max(least_frames, frames // step * step + least_frames % step)
        tokens = (width // self.step) * (height // self.step) * (1 + (frames - 1) // step)
        if self.family.shared and tokens < self.sharing:
            raise PromptError(
                "size",
                f"size {width}x{height}: {tokens} tokens for the {self.sharing} ranks that share the sequence; "
                "expected a larger size",
            )
        return replace(prompt, size=(width, height), frames=frames)


def _by_vae(name: str, folder: Path) -> Family:
    """Read the properties of a pipeline of Wan or Qwen-Image from its VAE and its transformer."""
    vae = read_config(folder / "vae")
    patch = read_json(folder / "transformer" / "config.json").get("patch_size", 2)
    video, _, _ = PIPELINES[name]
    width, height, frames, fps = vae.usual
    # Qwen-Image packs two by two cells in a token.
    rows = int(patch[-1] if isinstance(patch, list) else patch) if video else 2
    return Family(
        vae.family, (width, height), vae.spatial_factor * rows, frames if video else 1, vae.temporal_factor, fps,
        "guidance_scale" if video else "true_cfg_scale", shared=True,
    )  # fmt: skip


def find_pipeline(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a pipeline: the given one, or a hub id's, which is downloaded if necessary.

    Args:
        source: a folder, or an id on the hub.
        revision: a branch, tag, or commit of a hub id. Only a commit always names the same files.

    Raises:
        CheckpointError: there is no such folder or hub id, the folder holds no pipeline, or `revision` is given for a
            folder.
    """
    folder = Path(source)
    if folder.is_dir() and revision is not None:
        raise CheckpointError(f"revision {revision!r}: {source} is a folder, which has no revisions")
    if not folder.is_dir():
        from diffusers import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(str(source), revision=revision, use_safetensors=True))
        except Exception as error:  # of many kinds: unknown name, no network, no access
            raise CheckpointError(f"{source}: neither a folder nor a pipeline on the hub ({error})") from error
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder}: expected a pipeline's folder, with a model_index.json")
    return folder
