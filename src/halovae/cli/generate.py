"""`halovae generate`: a prompt to a video or a picture, without a server."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from halovae import media
from halovae.cli.common import Dtype, check_installed, console, errors_shown, parse_bytes, parse_size, parsed
from halovae.cli.writing import bar, outputs, tell, write
from halovae.generation import Generator, Prompt
from halovae.launch import launch, under_torchrun
from halovae.lines import world_size


@dataclass(frozen=True)
class _Job:
    """All that a rank has to know."""

    prompt: Prompt
    model: str
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
    fps: Annotated[float, typer.Option(min=0.01, help="Frames per second of a video.")] = 16.0,
    report: Annotated[
        Path | None, typer.Option(help="A JSON file for what the decode took; one that exists is replaced.")
    ] = None,
) -> None:
    """Generate a video or a picture on one device, or on several at once.

    All ranks share the transformer's sequence, and then the decode. The output appears under its name when it is whole.
    """
    with errors_shown():
        check_installed("generate", "diffusers", "transformers")
        ranks = num_gpus or (world_size() if under_torchrun() else 1)
        if ulysses_degree is None:
            ulysses_degree = max(1, ranks // ring_degree)
        if ulysses_degree * ring_degree != ranks:
            raise ValueError(
                f"--ulysses-degree {ulysses_degree} x --ring-degree {ring_degree}: expected a product of {ranks} ranks"
            )
        if Path(model_path).is_dir() and not (Path(model_path) / "model_index.json").exists():
            raise ValueError(f"--model-path {model_path}: expected a pipeline's folder, with a model_index.json")
        images = tuple(image or ())
        for path in images:
            media.read_clip(path)  # raises now, not on every rank
        media.check_output(output)
        if report is not None:
            media.check_writable(report)
        job = _Job(
            prompt=Prompt(
                text=prompt,
                size=parsed("--size", size, parse_size) if size else None,
                frames=num_frames,
                steps=num_inference_steps,
                seed=seed,
                negative=negative_prompt,
                guidance=guidance_scale,
                guidance_2=guidance_scale_2,
                images=images,
            ),
            model=model_path,
            output=output,
            dtype=dtype.torch,
            vae_dtype=vae_precision.torch,
            ulysses=ulysses_degree,
            ring=ring_degree,
            memory_budget=parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None,
            fps=fps,
            report=report,
        )
        try:
            launch(ranks, _run, job)
        finally:  # a rank that was ended from outside could not tidy up
            media.discard(media.partial_of(output))


def _run(job: _Job) -> None:
    """One rank's work; rank 0 writes the frames."""
    generator = Generator(job.model, job.dtype, job.vae_dtype, job.ulysses, job.ring)
    prompt = generator.fitted(job.prompt)
    assert prompt.frames is not None
    media.check_output(job.output, prompt.frames)
    first = not dist.is_initialized() or dist.get_rank() == 0
    with ExitStack() as stack:
        shown = stack.enter_context(bar("steps")) if first else None
        task = shown.add_task("denoising", total=prompt.steps) if shown is not None else None

        def told(step: int) -> None:
            if shown is not None and task is not None:
                shown.update(task, completed=step)

        latents = generator.denoise(prompt, told)
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
