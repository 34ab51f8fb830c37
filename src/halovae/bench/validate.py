"""Whether the target models decode correctly here: on one rank and in parallel, against diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halovae.bench.compare import Difference, compare, draw_heatmap
from halovae.bench.measure import Contestant, Model, Taken
from halovae.bench.pipeline import PipelineRun, run_both
from halovae.bench.report import GB, markdown_table
from halovae.bench.run import check_fits, model_path, subject_of
from halovae.device.kinds import Device
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import Link
from halovae.grid import Grid
from halovae.models.architectures import TARGETS
from halovae.models.load import read_class

# In fp32 only the order of additions differs from diffusers'.
FP32_BOUND = 1e-4
# In other dtypes the error against fp32 may be this many times diffusers' own.
ROUNDED_BOUND = 1.1


@dataclass(frozen=True)
class Mode:
    """One way to decode a model, against diffusers.

    Attributes:
        name: "single", "parallel" or "simulated".
        grid: the grid of ranks.
        difference: the difference from diffusers' untiled decode in fp32.
        bound: the largest accepted error: of `max_error` in fp32, of `rms_error` in other dtypes.
        supported: whether the error is within the bound.
        taken: time and memory; None for simulated ranks.
        seconds: decoding time, predicted for simulated ranks.
        peak_allocated: bytes of the rank with the most.
    """

    name: str
    grid: str
    difference: Difference
    bound: float
    supported: bool
    taken: Taken | None
    seconds: float
    peak_allocated: int


@dataclass(frozen=True)
class Pipeline:
    """The frames in [0, 1] of a whole pipeline with halovae's decode, against those with diffusers' decode."""

    max_error: float
    bound: float
    seconds: float
    seconds_diffusers: float

    @property
    def supported(self) -> bool:
        return self.max_error <= self.bound


@dataclass(frozen=True)
class Verdict:
    """The results of one model.

    Attributes:
        model: the model's name.
        source: the checkpoint, or the family of random weights.
        latents: the shape of the decoded latents.
        modes: the results of each mode.
        problem: why the model could not be decoded at all; empty if it could.
        pipeline: the results of the whole pipeline, if there was a prompt.
    """

    model: str
    source: str
    latents: tuple[int, ...]
    modes: tuple[Mode, ...]
    problem: str = ""
    pipeline: Pipeline | None = None

    @property
    def supported(self) -> bool:
        pipeline = self.pipeline is None or self.pipeline.supported
        return not self.problem and pipeline and all(mode.supported for mode in self.modes)


@dataclass(frozen=True)
class Validation:
    """What to validate.

    Attributes:
        models: names in `TARGETS` or `families()`, or one name that the caller gives `source`.
        source: a checkpoint; None for random weights of the true size.
        ranks: how many ranks decode in parallel.
        simulated: how many ranks to simulate on one device instead; None for real ones.
        size: `(width, height)` of images and of clips.
        frames: frames of clips.
        dtype: the dtype of computation.
        device: the kind of device.
        threads: CPU threads of each rank.
        heatmaps: folder for pictures of the differences; None draws none.
        prompt: prompt for the checkpoint's whole pipeline; None decodes random latents only.
        steps: denoising steps of the pipeline.
    """

    models: tuple[str, ...]
    source: str | None
    ranks: int
    simulated: int | None
    size: tuple[int, int]
    frames: int
    dtype: torch.dtype
    device: str
    threads: int
    heatmaps: Path | None
    prompt: str | None = None
    steps: int = 4


def validate(validation: Validation, describe: Callable[[str], None], on_step: Callable[[], None]) -> list[Verdict]:
    """Decode each model with diffusers, on one rank, and in parallel, and compare.

    Args:
        validation: what to validate.
        describe: called with what is being done.
        on_step: called after each model.
    """
    verdicts = []
    for index, name in enumerate(validation.models):
        source = validation.source or TARGETS.get(name, (name,))[0]
        try:
            verdicts.append(_verdict(validation, name, source, index, describe))
        except (ValueError, RuntimeError) as error:
            verdicts.append(Verdict(name, source, (), (), f"{type(error).__name__}: {error}"))
        on_step()
    return verdicts


def _verdict(validation: Validation, name: str, source: str, seed: int, describe: Callable[[str], None]) -> Verdict:
    with model_path(source, describe) as path:
        device = Device.default(validation.device)
        clips = TARGETS[name][1] if name in TARGETS else None
        subject = subject_of(path, validation.size, validation.frames, seed=seed, clips=clips)
        latents, factor = subject.latents, subject.factor
        parallel = Grid(rows=validation.simulated or validation.ranks)
        parallel.shards(1, *latents.shape[-2:])
        check_fits(subject.family, path, device, validation.ranks)
        exact = Model(path, read_class(path), torch.float32, validation.device, exact=True)
        model = replace(exact, dtype=validation.dtype)

        describe(f"{name}: diffusers")
        with closing(Contestant("diffusers", exact, 1, validation.threads, kind="diffusers")) as theirs:
            reference, _ = _decoded(theirs, latents)
        bound = FP32_BOUND
        if validation.dtype != torch.float32:
            with closing(Contestant("diffusers", model, 1, validation.threads, kind="diffusers")) as theirs:
                rounded, _ = _decoded(theirs, latents)
            bound = ROUNDED_BOUND * compare(rounded, reference, Grid(), factor).rms_error

        def mode(label: str, grid: Grid, frames: Tensor, taken: Taken | None, seconds: float, allocated: int) -> Mode:
            difference = compare(frames, reference, grid, factor)
            error = difference.max_error if validation.dtype == torch.float32 else difference.rms_error
            if validation.heatmaps is not None:
                path = validation.heatmaps / f"difference-{name}-{label}-{grid}.png"
                draw_heatmap(frames, reference, grid, factor, path)
            return Mode(label, str(grid), difference, bound, error <= bound, taken, seconds, allocated)

        describe(f"{name}: single")
        with closing(Contestant("single", model, 1, validation.threads)) as single:
            frames, taken = _decoded(single, latents)
            modes = [mode("single", Grid(), frames, taken, taken.seconds, taken.memory.peak_allocated)]
            if validation.simulated:
                describe(f"{name}: simulating {parallel}")
                simulation = single.simulate(latents, parallel, Link())
                allocated = max(rank.peak_allocated for rank in simulation.ranks)
                frames = _clip(simulation.frames)
                modes.append(mode("simulated", parallel, frames, None, simulation.seconds, allocated))
        if not validation.simulated:
            describe(f"{name}: parallel, {parallel}")
            with closing(Contestant("parallel", model, parallel.size, validation.threads)) as several:
                frames, taken = _decoded(several, latents)
            modes.append(mode("parallel", parallel, frames, taken, taken.seconds, taken.memory.peak_allocated))
        pipeline = None if validation.prompt is None else _pipeline(validation, validation.prompt, source, describe)
        return Verdict(name, source, tuple(latents.shape), tuple(modes), pipeline=pipeline)


def _pipeline(validation: Validation, prompt: str, source: str, describe: Callable[[str], None]) -> Pipeline:
    describe("the whole pipeline, twice")
    run = PipelineRun(
        source, prompt, validation.steps, validation.size, validation.frames, validation.dtype, validation.device
    )
    with Ranks(validation.ranks, validation.threads) as ranks:
        theirs, ours, their_seconds, our_seconds = ranks.run(run_both, run)[0]
    # [-1, 1] becomes [0, 1], which halves errors. Other dtypes round both decodes: the bound is a few steps of them.
    bound = FP32_BOUND / 2 if validation.dtype == torch.float32 else 16 * torch.finfo(validation.dtype).eps
    return Pipeline((ours - theirs).abs().max().item(), bound, our_seconds, their_seconds)


def _decoded(contestant: Contestant, latents: Tensor) -> tuple[Tensor, Taken]:
    """Return a contestant's frames, and what the decode took after warming up.

    Raises:
        RuntimeError: the contestant ran out of memory.
    """
    contestant.warm_up(latents)
    contestant.decode(latents, keep=True)
    if contestant.frames is None:
        reached = contestant.out_of_memory or 0
        raise RuntimeError(f"{contestant.name} ran out of memory at {reached / GB:.2f} GB reserved")
    return _clip(contestant.frames), contestant.taken[0]


def _clip(frames: Tensor) -> Tensor:
    return frames if frames.ndim == 5 else frames.unsqueeze(2)


COLUMNS = (
    "model", "mode", "supported", "max error", "PSNR (dB)", "SSIM", "error at seams", "elsewhere",
    "decoding (s)", "peak memory (GB)", "peak allocated (GB)", "pool overhead (GB)", "remaining (GB)",
)  # fmt: skip


def cells(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A row of `COLUMNS` per model and mode."""
    lines = []
    for verdict in verdicts:
        if verdict.problem:
            reason = verdict.problem.strip().splitlines()[-1]  # the exception at the end of a rank's traceback
            lines.append([verdict.model, reason, "NO", *["-"] * (len(COLUMNS) - 3)])
        for mode in verdict.modes:
            difference, memory = mode.difference, mode.taken.memory if mode.taken else None
            reserved = (
                ["-", f"{mode.peak_allocated / GB:.2f}", "-", "-"]
                if memory is None
                else [
                    f"{size / GB:.2f}"
                    for size in (memory.peak_reserved, memory.peak_allocated, memory.pool_overhead, memory.remaining)
                ]
            )
            lines.append(
                [
                    verdict.model,
                    f"{mode.name} {mode.grid}",
                    "yes" if mode.supported else "NO",
                    f"{difference.max_error:.1e}",
                    "equal" if difference.psnr is None else f"{difference.psnr:.1f}",
                    f"{difference.ssim:.6f}",
                    f"{difference.seam_error:.1e}",
                    f"{difference.interior_error:.1e}",
                    f"{mode.seconds:.2f}",
                    *reserved,
                ]
            )
    return lines


def markdown(verdicts: Sequence[Verdict], about: dict[str, Any], notes: Sequence[str]) -> str:
    """The report in Markdown."""
    lines = ["# halovae validate", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [*markdown_table(COLUMNS, cells(verdicts)), "", *notes, ""]
    return "\n".join(lines)


def pipelines(verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence per whole pipeline that ran."""
    return [
        f"{verdict.model}, the whole pipeline: frames differ from those with diffusers' decode by at most "
        f"{one.max_error:.1e} (accepted: {one.bound:.1e}), in {one.seconds:.2f} s against {one.seconds_diffusers:.2f} s"
        for verdict in verdicts
        if (one := verdict.pipeline) is not None
    ]


def notes(validation: Validation) -> list[str]:
    """Sentences on how to read the table."""
    lines = [
        "Errors are against diffusers' own untiled decode in fp32, in [-1, 1]; seams are the borders between ranks."
    ]
    if validation.source is None:
        lines.append("Models of the true size on seeded random weights: times and memory are real, pictures are not.")
    if validation.simulated:
        lines.append("Simulated ranks took turns in one process: times are predicted for a device and link each.")
    return lines


def as_json(verdicts: Sequence[Verdict], about: dict[str, Any]) -> str:
    """All verdicts, for programs."""
    models = [{**asdict(verdict), "supported": verdict.supported} for verdict in verdicts]
    return json.dumps({**about, "models": models}, indent=2)
