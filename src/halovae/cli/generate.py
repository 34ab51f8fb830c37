"""`halovae generate`: a prompt to a video or a picture, without a server."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from halovae.cli.common import Dtype, check_installed, console, degrees, errors_shown, parse_bytes, parse_size, parsed
from halovae.cli.writing import bar, outputs, tell, write
from halovae.distributed.launch import launch, under_torchrun
from halovae.distributed.transport import world_size
from halovae.io import media
from halovae.pipelines.generator import Generator
from halovae.pipelines.specs import Pipeline, Prompt, find_pipeline


@dataclass(frozen=True)
class _Job:
    """All that a rank has to know."""

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
    prompt: Annotated[str, typer.Argument(help="What to make.")],
    model_path: Annotated[str, typer.Option(help="A pipeline's folder in diffusers layout, or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="clip.mp4, picture.png, or a folder's name for numbered PNGs.")
    ],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT. [default: the model's usual]")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of a video. [default: the model's usual]")] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Steps of denoising.")] = 50,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly the prompt leads.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="The same for Wan2.2's second transformer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal noise.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture to start from, or to edit; may be repeated.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="How many ranks to start here. [default: 1]")] = None,
    ulysses_degree: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share attention by heads. [default: all that ring leaves]")
    ] = None,
    ring_degree: Annotated[int, typer.Option(min=1, help="Ranks that share attention in turns.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of the transformer and the text encoder.")] = Dtype.bf16,
    vae_precision: Annotated[Dtype, typer.Option(help="Of the VAE.")] = Dtype.fp32,
    memory_budget: Annotated[
        str | None, typer.Option(help="What a rank may take to decode, such as 8GiB. [default: what is free]")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames per second of a video. [default: the model's usual]")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A JSON file for what the decode took; one that exists is replaced.")
    ] = None,
) -> None:
    """Generate a video or a picture on one device, or on several at once.

    All ranks share the decode, and before it the transformer's sequence where diffusers can share that (Wan,
    Qwen-Image, FLUX). The output appears under its name when it is whole.
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
        kind = Pipeline.read(model)
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
        finally:  # a rank that was ended from outside could not tidy up
            media.discard(media.partial_of(output))


def _run(job: _Job) -> None:
    """One rank's work; rank 0 writes the frames."""
    generator = Generator(job.model, job.dtype, job.vae_dtype, job.ulysses, job.ring)
    prompt = job.prompt
    assert prompt.frames is not None
    first = not dist.is_initialized() or dist.get_rank() == 0
    with ExitStack() as stack:
        shown = stack.enter_context(bar("steps")) if first else None
        task = shown.add_task("denoising", total=prompt.steps) if shown is not None else None

        def told(step: int) -> None:
            if shown is not None and task is not None:
                shown.update(task, completed=step)

        if generator.kind.whole:
            made = generator.make(prompt, told, memory_budget=job.memory_budget)
        else:
            latents = generator.denoise(prompt, told)
    if generator.kind.whole:
        paths, report = [job.output], made.report
        if made.frames is not None:
            write([made.frames], paths, job.fps, prompt.frames)
    else:
        pieces = generator.decoder.stream(latents, dtype=torch.uint8, denormalize=True, memory_budget=job.memory_budget)
        paths = outputs(job.output, len(latents))
        if first:
            write(pieces, paths, job.fps, prompt.frames)
        else:
            pieces.join()
        report = pieces.shared_report()
    if first:
        width, height = prompt.size or (0, 0)
        console.print(f"made {width}x{height}, {prompt.frames} frame(s), {prompt.steps} steps, seed {prompt.seed}")
        tell(report, paths, job.report)
