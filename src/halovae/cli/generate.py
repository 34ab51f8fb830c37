"""`halovae generate`: generate a video or a picture from a prompt, without a server."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from halovae.cli.common import (
    Dtype,
    Interface,
    check_installed,
    console,
    degrees,
    errors_shown,
    parse_bytes,
    parse_size,
    parsed,
)
from halovae.cli.writing import bar, outputs, print_report, write
from halovae.distributed.launch import launch, under_torchrun
from halovae.distributed.transport import world_size
from halovae.io import media
from halovae.pipelines.generator import Generator
from halovae.pipelines.specs import Pipeline, Prompt, find_pipeline


@dataclass(frozen=True)
class _Job:
    """Everything that a rank needs to know."""

    prompt: Prompt
    model: Path
    output: Path
    dtype: torch.dtype
    vae_dtype: torch.dtype
    ulysses: int
    ring: int
    memory_budget: int | None
    fps: float
    report: Path | None


def generate(
    prompt: Annotated[str, typer.Argument(help="What to generate.")],
    model_path: Annotated[str, typer.Option(help="A pipeline's folder in diffusers layout, or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="clip.mp4, picture.png, or a folder for numbered PNGs.")
    ],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", show_default="the model's usual")] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video.", show_default="the model's usual")
    ] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 50,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="The same for Wan2.2's second transformer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal noise.")] = 0,
    image: Annotated[list[Path] | None, typer.Option(help="Picture to start from or to edit; may be repeated.")] = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs, one rank each.", show_default="1")
    ] = None,
    ulysses_degree: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that split attention by heads.", show_default="what the ring leaves"),
    ] = None,
    ring_degree: Annotated[int, typer.Option(min=1, help="Ranks that split attention in a ring.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the transformer and the text encoder.")] = Dtype.bf16,
    vae_precision: Annotated[Dtype, typer.Option(help="Dtype of the VAE.")] = Dtype.fp32,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory that a rank may use to decode, such as 8GiB.", show_default="what is free"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames per second of a video.", show_default="the model's usual")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="JSON file for a report of the decode; an existing file is replaced.")
    ] = None,
    interface: Interface = None,
) -> None:
    """Generate a video or a picture on one device, or on several at once.

    All ranks share the decode. They also share the transformer's sequence where diffusers supports it (Wan,
    Qwen-Image, FLUX). The output appears under its name once it is complete.
    """
    with errors_shown():
        check_installed("generate", "diffusers", "transformers")
        ranks = num_gpus or (world_size() if under_torchrun() else 1)
        ulysses, ring = degrees(ranks, None, ulysses_degree, ring_degree)
        model = find_pipeline(model_path)
        images = tuple(image or ())
        for path in images:
            media.read_clip(path)  # raises now, not on every rank
        asked = Prompt(
            text=prompt,
            size=parsed("--size", size, parse_size) if size else None,
            frames=num_frames,
            steps=num_inference_steps,
            seed=seed,
            negative=negative_prompt,
            guidance=guidance_scale,
            guidance_2=guidance_scale_2,
            images=tuple(path.read_bytes() for path in images),
        )
        kind = replace(Pipeline.read(model), sharing=ulysses * ring)
        fitted = kind.fitted(asked)
        media.check_output(output, fitted.frames)
        if report is not None:
            media.check_writable(report)
        job = _Job(
            prompt=fitted,
            model=model,
            output=output,
            dtype=dtype.torch,
            vae_dtype=vae_precision.torch,
            ulysses=ulysses,
            ring=ring,
            memory_budget=parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None,
            fps=fps or kind.fps,
            report=report,
        )
        try:
            launch(ranks, _run, job)
        finally:  # a rank that was killed could not clean up
            media.discard(media.partial_of(output))


def _run(job: _Job) -> None:
    """Generate on one rank. Rank 0 writes the frames."""
    generator = Generator(job.model, job.dtype, job.vae_dtype, job.ulysses, job.ring)
    prompt = job.prompt
    assert prompt.frames is not None
    first = not dist.is_initialized() or dist.get_rank() == 0
    with ExitStack() as stack:
        shown = stack.enter_context(bar("steps")) if first else None
        task = shown.add_task("denoising", total=prompt.steps) if shown is not None else None

        def on_step(step: int) -> None:
            if shown is not None and task is not None:
                shown.update(task, completed=step)

        if generator.kind.whole:
            made = generator.make(prompt, on_step, options={"memory_budget": job.memory_budget})
        else:
            latents = generator.denoise(prompt, on_step)
    if generator.kind.whole:
        paths, report = [job.output], made.report
        if made.frames is not None:
            write([made.frames], paths, job.fps, prompt.frames)
    else:
        pieces = generator.decoder.stream(latents, dtype=torch.uint8, denormalize=True, memory_budget=job.memory_budget)
        paths = outputs(job.output, len(latents))
        if first:
            write(pieces.on_host(), paths, job.fps, prompt.frames)
        else:
            pieces.join()
        report = pieces.shared_report()
    if first:
        width, height = prompt.size or (0, 0)
        console.print(f"made {width}x{height}, {prompt.frames} frame(s), {prompt.steps} steps, seed {prompt.seed}")
        print_report(report, paths, job.report)
