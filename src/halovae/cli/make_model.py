"""`halovae make-model`: a complete pipeline on random weights, for trying things without a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae import media
from halovae.cli.common import check_installed, console, errors_shown


class Name(str, Enum):
    """What can be made."""

    wan21 = "wan2.1"
    wan21_i2v = "wan2.1-i2v"
    wan22 = "wan2.2"
    wan22_5b = "wan2.2-5b"
    qwen_image = "qwen-image"
    qwen_image_edit = "qwen-image-edit"
    qwen_image_edit_plus = "qwen-image-edit-plus"


class Size(str, Enum):
    """How large."""

    tiny = "tiny"


def make_model(
    model: Annotated[Name, typer.Argument(help="Which pipeline; wan2.2 has two transformers, as A14B does.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a pipeline in it is replaced.")],
    size: Annotated[Size, typer.Option(help="tiny: a few megabytes, one or two layers of everything.")] = Size.tiny,
) -> None:
    """Make a complete pipeline on random weights in diffusers layout, tokenizer and all.

    What it generates is noise: it is for trying the server and for tests.
    """
    with errors_shown():
        check_installed("make-model", "diffusers", "transformers")
        if output.exists() and not (output / "model_index.json").exists():
            raise FileExistsError(f"output {output} is there and holds no pipeline; name another folder")
        media.check_writable(output)
        from halovae import tiny

        partial = media.partial_of(output)
        media.discard(partial)
        try:
            tiny.make_model(model.value, partial)
            media.discard(output)
            partial.replace(output)
        finally:
            media.discard(partial)
        console.print(f"{output}: a {size.value} {model.value} on random weights", soft_wrap=True, highlight=False)
