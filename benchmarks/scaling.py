"""The most that two ranks could gain: two halves decoded at once without messages, compared with a shared decode.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model flux --latent 1x16x64x64

The plain module on one rank is measured, too. On a machine whose cores share caches and memory, two processes are
slower than half the work of one, whatever they decode. The time of the shared decode beyond the halves' time is the
cost of halos and waiting. Halves that meet at each GroupNorm show only the waiting: an exact decode has to meet there.
Models without GroupNorm do not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from halovae import Grid
from halovae.distributed.mesh import mesh_for
from halovae.distributed.ranks import Ranks
from halovae.models.architectures import random_vae
from halovae.models.registry import families
from halovae.plane import group_norms, operators
from halovae.runtime.vae import VAE


def main() -> None:
    """Measure in turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(families()), default="wan2.1")
    parser.add_argument("--latent", default="1x16x3x32x32", help="BxCxTxHxW or BxCxHxW with an even H")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    whole = torch.randn(*map(int, args.latent.split("x")), generator=torch.Generator().manual_seed(0))
    half = whole[..., : whole.shape[-2] // 2, :].contiguous()
    table = Table(title=f"{args.model}, {args.latent}, fp32, 1 thread a rank", title_justify="left")
    for column in ("decode", "median (s)", "all (s)", "waiting for halos (s)"):
        table.add_column(column)
    _measure(args.model, whole, half, args.repeat, table)
    Console().print(table)


def _measure(model: str, whole: torch.Tensor, half: torch.Tensor, repeat: int, table: Table) -> None:
    groups = {ranks: Ranks(ranks, 1) for ranks in (1, 2)}
    both = torch.cat([half] * 2)
    cases: dict[str, tuple[int, torch.Tensor, Grid | None, bool]] = {
        "the plain module, 1 rank": (1, whole, None, False),
        "whole, 1 rank": (1, whole, Grid(), False),
        "whole, 2x1": (2, whole, Grid(rows=2), False),
        "a half, 1 rank": (1, half, Grid(), False),
        "a half each, no messages": (2, both, Grid(batch=2), False),
        "a half each, meeting at norms": (2, both, Grid(batch=2), True),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    try:
        for turn in range(repeat + 1):
            for name, (ranks, latents, grid, meeting) in cases.items():
                outcomes = groups[ranks].run(_decoded, model, latents, grid, meeting)
                if turn:  # the first one records and warms up
                    taken[name].append((max(one for one, _ in outcomes), max(one for _, one in outcomes)))
    finally:
        for group in groups.values():
            group.close()
    for name, times in taken.items():
        seconds = [one for one, _ in times]
        shown = " ".join(f"{one:.2f}" for one in seconds)
        waiting = statistics.median(one for _, one in times)
        table.add_row(name, f"{statistics.median(seconds):.2f}", shown, f"{waiting:.2f}")
    medians = {name: statistics.median(one for one, _ in times) for name, times in taken.items()}
    replay = statistics.median(
        own / plain
        for (own, _), (plain, _) in zip(taken["whole, 1 rank"], taken["the plain module, 1 rank"], strict=True)
    )
    shared, met = (
        statistics.median(
            separate / own
            for (separate, _), (own, _) in zip(taken["a half each, no messages"], taken[name], strict=True)
        )
        for name in ("whole, 2x1", "a half each, meeting at norms")
    )
    faster = medians["whole, 1 rank"] / medians["whole, 2x1"]
    table.caption = (
        f"replay: {replay:.3f} of the plain module's time; 2x1: {faster:.3f}x one rank, {shared:.3f} of what two "
        f"separate halves reach, halves that meet at norms {met:.3f} (medians of the turns' ratios)"
    )


_models: dict[str, VAE] = {}


def _decoded(model: str, latents: torch.Tensor, grid: Grid | None, meeting: bool) -> tuple[float, float]:
    """Return the seconds of this rank's decode, without gathering, and of its waiting without that of `meeting`."""
    if model not in _models:
        _models[model] = VAE(random_vae(model))
        _models[model].warmup((1, *latents.shape[1:]), grid=grid or Grid(), gather="none")
    decoder = _models[model]
    if grid is None:
        begin = time.perf_counter()
        with torch.no_grad():
            decoder.module.decode(latents)  # type: ignore[operator]
        return time.perf_counter() - begin, 0.0
    with patch.object(operators, "statistics", _met) if meeting else nullcontext():
        decoder.decode(latents, grid=grid, gather="none")
    assert decoder.report is not None
    return decoder.report.seconds, decoder.report.waiting


_statistics = group_norms.statistics


def _met(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the statistics of a GroupNorm after the other rank has its own."""
    result = _statistics(*args, **kwargs)
    mesh_for(Grid(rows=2), result.device).transport.all_gather("rows", result.flatten(), 2)
    return result


if __name__ == "__main__":
    main()
