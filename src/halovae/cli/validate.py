"""`halovae validate`: check that the target models decode correctly here, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halovae import __version__
from halovae.cli.common import Dtype, check_installed, errors_shown, parse_size, parsed, results_console
from halovae.cli.measuring import check_ranks, free_names, progress
from halovae.device.kinds import threads_per_rank


def validate(
    model_path: Annotated[
        str | None,
        typer.Option(
            help="A folder, file, or hub id of a VAE or a pipeline.", show_default="all models with random weights"
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Models, comma-separated: target models, or flux, sdxl, mochi, ...", show_default="all target models"
        ),
    ] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, one rank each.")] = 2,
    simulate_ranks: Annotated[
        int | None, typer.Option(min=2, help="Number of ranks to simulate on one device instead.")
    ] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = "256x256",
    frames: Annotated[int, typer.Option(min=1, help="Frames of clips; images have one.")] = 5,
    prompt: Annotated[str | None, typer.Option(help="Run the whole pipeline of --model-path with this prompt.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps, with --prompt.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, npu, xpu, or mps.", show_default="what is here")
    ] = None,
    heatmap: Annotated[
        bool, typer.Option("--heatmap", help="Draw where decodes differ from diffusers' decodes.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to; files there are kept.")] = (
        Path("halovae-validation")
    ),
) -> None:
    """Decode each target model with diffusers, on one rank, and in parallel, and compare.

    A model is supported if its frames differ from diffusers' fp32 frames by at most 1e-4 in fp32, and by at most 1.1
    times as much as diffusers' own frames in another dtype. Writes validation-DEVICE.md and .json. The exit status is
    1 if any model is not supported.
    """
    with errors_shown():
        check_installed("halovae validate", "diffusers", "matplotlib", "skimage")
        from halovae.bench import validate as validation
        from halovae.models.architectures import TARGETS
        from halovae.models.registry import families

        chosen = tuple(models.split(",")) if models else tuple(TARGETS)
        known = [*TARGETS, *(name for name, family in families().items() if family.widths is None)]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise ValueError(f"--models {','.join(unknown)}: expected some of {','.join(known)}")
        if model_path is not None:
            if models:
                raise ValueError("--models and --model-path exclude each other")
            chosen = (Path(model_path).name or model_path,)
        if prompt is not None and (model_path is None or simulate_ranks):
            raise ValueError("--prompt needs --model-path of a whole pipeline, and real ranks")
        target = check_ranks("--num-gpus", 1 if simulate_ranks else num_gpus, device)
        asked = validation.Validation(
            models=chosen,
            source=model_path,
            ranks=1 if simulate_ranks else num_gpus,
            simulated=simulate_ranks,
            size=parsed("--size", size, parse_size),
            frames=frames,
            dtype=dtype.torch,
            device=target.kind,
            threads=threads_per_rank(1 if simulate_ranks else num_gpus),
            heatmaps=output if heatmap else None,
            prompt=prompt,
            steps=steps,
        )
        paths = free_names(output, f"validation-{target.kind}.md", f"validation-{target.kind}.json")
        with progress(len(chosen)) as (describe, on_step):
            verdicts = validation.validate(asked, describe, on_step)
        about = {"halovae": __version__, **target.describe(), "dtype": dtype.value, "size": size}
        notes = [*validation.pipelines(verdicts), *validation.notes(asked)]
        paths[0].write_text(validation.markdown(verdicts, about, notes))
        paths[1].write_text(validation.as_json(verdicts, about) + "\n")
        console, table = (
            results_console(),
            Table(title=f"halovae {__version__} on {about['device']}", title_justify="left"),
        )
        for column in validation.COLUMNS:
            table.add_column(column)
        for line in validation.cells(verdicts):
            table.add_row(*line)
        console.print(table)
        for note in notes:
            console.print(note, soft_wrap=True, highlight=False)
        short = [verdict.model for verdict in verdicts if not verdict.supported]
        total = len(verdicts)
        summary = f"{total - len(short)} of {total} supported" + (f"; short: {', '.join(short)}" if short else "")
        console.print(f"{summary}. Written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)
        if short:
            raise typer.Exit(1)
