"""`halovae make-model`: make a complete pipeline with random weights, to try things without a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae.cli.common import check_installed, console, errors_shown
from halovae.io import media
from halovae.pipelines.families import FAMILIES

# Wan's and Qwen-Image's, and all others.
NAMES = (
    "wan2.1", "wan2.1-i2v", "wan2.2", "wan2.2-5b", "qwen-image", "qwen-image-edit", "qwen-image-edit-plus",
    *(family.name for family in FAMILIES.values()),
)  # fmt: skip


class Size(str, Enum):
    """The size of the pipeline."""

    tiny = "tiny"


def make_model(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}. wan2.2 has two transformers, like A14B.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a pipeline there is replaced.")],
    size: Annotated[
        Size, typer.Option(help="tiny: a few megabytes, with one or two layers of everything.")
    ] = Size.tiny,
) -> None:
    """Make a complete pipeline with random weights in diffusers layout, including its tokenizer.

    The pipeline generates noise. Use it to try the server, or in tests.
    """
    with errors_shown():
        if model not in NAMES:
            raise ValueError(f"model {model!r}: expected one of {', '.join(NAMES)}")
        check_installed("make-model", "diffusers", "transformers")
        if output.exists() and not (output / "model_index.json").exists():
            raise FileExistsError(f"output {output} is there and holds no pipeline; name another folder")
        media.check_writable(output)
        from halovae.pipelines import tiny

        partial = media.partial_of(output)
        media.discard(partial)
        try:
            tiny.make_model(model, partial)
            media.discard(output)
            partial.replace(output)
        finally:
            media.discard(partial)
        console.print(f"{output}: a {size.value} {model} with random weights", soft_wrap=True, highlight=False)
