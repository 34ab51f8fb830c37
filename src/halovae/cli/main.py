"""`halovae`: the command with all subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from halovae import __version__
from halovae.cli import (
    bench,
    calibrate,
    dataset,
    decode,
    demo,
    encode,
    generate,
    inspect,
    make_model,
    plan,
    serve,
    validate,
)

app = typer.Typer(
    name="halovae",
    help="Decode the latents of diffusion models into pictures and video, on many devices at once, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"halovae {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    serve.serve, generate.generate, decode.decode, encode.encode, inspect.inspect, plan.plan, calibrate.calibrate,
    bench.bench, validate.validate, make_model.make_model, demo.demo,
):  # fmt: skip
    app.command()(command)
app.add_typer(dataset.app, name="dataset")

if __name__ == "__main__":
    app()
