"""A benchmark: modes take turns over the same latents, for each size and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from halovae.bench.measure import Contestant, Model
from halovae.bench.profile import Profile
from halovae.bench.report import Row
from halovae.device.kinds import Device
from halovae.distributed.transport import Link
from halovae.grid import Grid
from halovae.models.architectures import DEMO, latent_shape, meta_vae_of, random_vae
from halovae.models.classes import makes_clips
from halovae.models.load import CLASSES, find_model, open_checkpoint, read_class, read_config, read_diffusers_config
from halovae.models.registry import families

MODES = ("single", "parallel", "tiled", "auto")
# Latent frames of a profiled decode: the first one and one like all others. Traces grow with each.
PROFILED = 2


@dataclass(frozen=True)
class Benchmark:
    """What to measure.

    Attributes:
        model: a name in `families()`, "demo", a VAE's folder in diffusers layout, its file, or a hub id.
        sizes: `(width, height)` of pictures.
        frames: frames of each clip.
        batches: how many clips are decoded at once.
        modes: names from `MODES`.
        ranks: numbers of ranks; "parallel" runs on each above one, "auto" on the largest.
        simulated: numbers of ranks to simulate on one device.
        repeat: decodes per row.
        threads: CPU threads of each rank.
        dtype: the dtype of computation.
        device: the kind of device.
        link: the link between simulated ranks.
    """

    model: str
    sizes: tuple[tuple[int, int], ...]
    frames: int
    batches: tuple[int, ...]
    modes: tuple[str, ...]
    ranks: tuple[int, ...]
    simulated: tuple[int, ...]
    repeat: int
    threads: int
    dtype: torch.dtype
    device: str
    link: Link

    @property
    def steps(self) -> int:
        """How many decodes the benchmark takes."""
        parallel = len([ranks for ranks in self.ranks if ranks > 1])
        modes = len(self.modes) + ("parallel" in self.modes) * (parallel - 1)
        return len(self.sizes) * len(self.batches) * (modes * self.repeat + len(self.simulated))

    def contestants(self, model: Model) -> list[Contestant]:
        """Return the contestants in the order of the table."""
        found = []
        if "single" in self.modes:
            found.append(Contestant("single", model, 1, self.threads))
        if "parallel" in self.modes:
            several = [ranks for ranks in self.ranks if ranks > 1]
            found += [Contestant("parallel", model, ranks, self.threads) for ranks in several]
        if "tiled" in self.modes:
            found.append(Contestant("tiled", model, 1, self.threads, kind="tiled"))
        if "auto" in self.modes:
            options = {"mode": "auto"}
            most = max(self.ranks)
            found.append(Contestant("auto", model, most, self.threads, options=options))
        return found


@contextmanager
def model_path(name: str, describe: Callable[[str], None]) -> Iterator[Path]:
    """Yield the VAE's folder or file. For a name in `families()`, it is made in its true size with random weights."""
    if name == "demo":
        yield DEMO
    elif name in families():
        describe(f"{name}: no checkpoint given, making the true-size architecture with random weights")
        with TemporaryDirectory(prefix="halovae-") as folder:
            random_vae(name).save_pretrained(folder)
            yield Path(folder)
    else:
        yield find_model(name)


@dataclass(frozen=True)
class Subject:
    """Latents to decode with a VAE.

    Attributes:
        family: the VAE's family, or its class.
        factor: pixels per latent cell.
        latents: seeded random latents.
    """

    family: str
    factor: int
    latents: Tensor


def subject_of(
    path: Path, size: tuple[int, int], frames: int, batch: int = 1, seed: int = 1234, clips: bool | None = None
) -> Subject:
    """Make seeded random latents for a VAE that decode to frames of `size`.

    Args:
        path: a folder in diffusers layout, or a file.
        size: `(width, height)` in pixels.
        frames: frames of clips; pictures have one.
        batch: how many clips or pictures.
        seed: seed of the latents.
        clips: whether the VAE makes clips; None to ask the model.

    Raises:
        ValueError: no latents decode to such frames; the message names the nearest sizes.
    """
    if read_class(path) in CLASSES:
        config = read_config(path)
        clips = config.makes_clips if clips is None else clips
        shape: tuple[int, ...] = config.latents(size, frames if clips else 1, batch)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return Subject(config.family, config.spatial_factor, latents)
    module = meta_vae_of(read_diffusers_config(path), str(path), torch.float32)
    name = type(module).__name__
    shape = latent_shape(module, name, size, frames if makes_clips(module) else 1)
    latents = torch.randn((batch * shape[0], *shape[1:]), generator=torch.Generator().manual_seed(seed))
    return Subject(name, size[1] // shape[-2], latents)


def check_fits(family: str, path: Path, device: Device, processes: int) -> None:
    """Check that the weights of all processes fit into free memory.

    Raises:
        ValueError: they do not.
    """
    weights = open_checkpoint(path).nbytes // 2  # the decoder is about half
    free, total = device.memory()
    if device.kind != "cpu":
        processes = 1
    if weights * processes > free:
        raise ValueError(
            f"{family}: {processes} x {weights / 1e9:.1f} GB of weights do not fit into the "
            f"{free / 1e9:.1f} GB that are free of {total / 1e9:.1f} GB on {device.kind}"
        )


def run(
    benchmark: Benchmark, describe: Callable[[str], None], on_step: Callable[[], None], traces: Path | None = None
) -> tuple[list[Row], list[Profile], dict[str, Any]]:
    """Run a benchmark.

    Args:
        benchmark: what to measure.
        describe: called with what is being done.
        on_step: called after each decode.
        traces: where to write a Chrome trace of each of halovae's contestants; None profiles nothing.

    Returns:
        The rows, the profiles, and what they were measured on.

    Raises:
        ValueError: the model cannot make a size, or the ranks cannot share it out.
    """
    device = Device.default(benchmark.device)
    rows: list[Row] = []
    profiles: list[Profile] = []
    with model_path(benchmark.model, describe) as path:
        model = Model(path, read_class(path), benchmark.dtype, benchmark.device)
        contestants = benchmark.contestants(model)
        for size in benchmark.sizes:  # before any work
            for batch in benchmark.batches:
                subject = subject_of(path, size, benchmark.frames, batch)
                check_fits(subject.family, path, device, sum(one.ranks for one in contestants))
                for ranks in (*benchmark.ranks, *benchmark.simulated):
                    Grid(rows=ranks).shards(batch, *subject.latents.shape[-2:])
        try:
            for size in benchmark.sizes:
                for batch in benchmark.batches:
                    latents = subject_of(path, size, benchmark.frames, batch).latents
                    rows += _measured(benchmark, contestants, latents, size, describe, on_step)
            if traces is not None:
                traces.mkdir()
                latents = subject_of(path, benchmark.sizes[0], benchmark.frames, benchmark.batches[0]).latents
                for contestant in (one for one in contestants if one.kind == "halovae"):
                    describe(f"profiling {contestant.name}, {contestant.ranks} rank(s)")
                    trace = traces / f"trace-{contestant.name}-{contestant.ranks}.json.gz"
                    crop = latents[:, :, :PROFILED] if latents.ndim == 5 else latents
                    profile = contestant.profile(crop, trace)
                    profiles += [] if profile is None else [profile]
        finally:
            for contestant in contestants:
                contestant.close()
    about = {
        "model": benchmark.model,
        "random_weights": benchmark.model in families(),
        "dtype": str(benchmark.dtype).removeprefix("torch."),
        "warmup_seconds": {f"{one.name}, {one.ranks}": round(one.warmup_seconds, 2) for one in contestants},
        "threads_per_rank": benchmark.threads if benchmark.device == "cpu" else None,
        **device.describe(),
    }
    return rows, profiles, about


def _measured(
    benchmark: Benchmark,
    contestants: Sequence[Contestant],
    latents: Tensor,
    size: tuple[int, int],
    describe: Callable[[str], None],
    on_step: Callable[[], None],
) -> list[Row]:
    for contestant in contestants:
        contestant.taken, contestant.out_of_memory = [], None
        describe(f"warming up {contestant.name}, {contestant.ranks} rank(s)")
        contestant.warm_up(latents)
    for repeat in range(benchmark.repeat):
        for contestant in contestants:
            describe(f"round {repeat + 1} of {benchmark.repeat}: {contestant.name}, {contestant.ranks} rank(s)")
            contestant.decode(latents)
            on_step()
    case: dict[str, Any] = {
        "size": f"{size[0]}x{size[1]}",
        "frames": benchmark.frames,
        "batch": latents.shape[0],
    }
    rows = [_row(contestant, case) for contestant in contestants]
    for ranks in benchmark.simulated:
        grid = Grid(rows=ranks)
        describe(f"simulating {ranks} ranks")
        simulation = contestants[0].simulate(latents, grid, benchmark.link)
        allocated = max(rank.peak_allocated for rank in simulation.ranks)
        rows.append(
            Row(
                "simulated",
                ranks,
                str(grid),
                **case,
                seconds=simulation.seconds,
                decodes=1,
                peak_allocated=allocated,
                by_rank=simulation.ranks,
            )
        )
        on_step()
    return rows


def _row(contestant: Contestant, case: dict[str, Any]) -> Row:
    grid = "" if contestant.report is None else contestant.report.grid
    if contestant.out_of_memory is not None or not contestant.taken:
        return Row(contestant.name, contestant.ranks, grid, **case, out_of_memory=contestant.out_of_memory)
    seconds = [taken.seconds for taken in contestant.taken]
    figures = ("peak_reserved", "peak_allocated", "pool_overhead", "remaining")
    memory: dict[str, Any] = {figure: contestant.memory(figure) for figure in figures}
    return Row(
        contestant.name,
        contestant.ranks,
        grid,
        **case,
        seconds=contestant.seconds,
        fastest=min(seconds),
        slowest=max(seconds),
        decodes=len(seconds),
        **memory,
    )
