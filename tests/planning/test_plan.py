"""Plans, their predictions against real decodes, and decodes that run out of memory."""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from samples import latents, reference, vae
from torch import Tensor
from typer.testing import CliRunner

import halovae
from halovae import Grid
from halovae.cli.main import app
from halovae.device.kinds import RANK_ENVIRONMENT
from halovae.distributed.mesh import mesh_for
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import Link, join_world, world_size
from halovae.errors import MemoryBudgetError
from halovae.kernels import native
from halovae.models import zoo
from halovae.models.architectures import random_vae
from halovae.plane.drain import drain_peers
from halovae.plane.results import Gather
from halovae.planning import calibrate
from halovae.planning.calibration import OTHER, Calibration, Rates, read, shipped
from halovae.planning.cost import Work
from halovae.planning.decision import Decision
from halovae.planning.graphs import traced
from halovae.planning.search import Search
from halovae.report import DecodeReport

CPU = torch.device("cpu")
FREE, RATES = Link(0, 0), {OTHER: Rates(flops=1e-9)}
# Where only FLOPs take time.
QUICK = Calibration("ideal", "cpu", "made up", RATES, RATES, {"host": FREE}, {"host": FREE})
# Where a message takes as long as a GFLOP.
SLOW = replace(QUICK, exchange={"host": Link(1, 0)}, gather={"host": Link(1, 0)})


def decided(shape: tuple[int, ...], world: int, calibration: Calibration, budget: int | None = None) -> Decision:
    """Return the decision about `shape[0]` latents `[C, T, H, W]`."""
    model, (batch, *item) = vae("wan2.1"), shape
    search = Search(
        lambda z: zoo.decode(model, z), model, (1, *item), torch.float32, calibration, batch=batch, budget=budget
    )
    return search.decide(world)


def test_all_ranks_share_where_messages_are_free_and_none_where_they_are_expensive() -> None:
    assert decided((1, 16, 1, 12, 12), 4, QUICK).chosen.grid.size == 4
    assert decided((1, 16, 1, 12, 12), 4, SLOW).chosen.grid.size == 1


def test_sharing_whole_items_needs_no_messages() -> None:
    chosen = decided((4, 16, 1, 12, 12), 2, SLOW).chosen
    assert str(chosen.grid) == "2x1x1"
    assert chosen.messages == 0


def test_ranks_that_would_not_help_stay_idle() -> None:
    assert decided((4, 16, 1, 1, 1), 5, QUICK).chosen.grid.size == 4


def test_a_decision_explains_the_other_grids() -> None:
    decision = decided((1, 16, 5, 8, 8), 2, SLOW)
    assert decision.chosen.verdict.startswith("chosen")
    assert all(one.verdict and not one.verdict.startswith("chosen") for one in decision.candidates[1:])
    assert "made up" in decision.calibration
    assert decision.as_dict()["chosen"]["grid"] == str(decision.chosen.grid)
    assert decision.as_dict()["chosen"]["ranks"] == decision.chosen.grid.size


def test_a_budget_is_kept_or_refused_with_what_would_fit() -> None:
    fastest = decided((1, 16, 5, 16, 8), 2, SLOW).chosen
    assert fastest.peak is not None
    leaner = decided((1, 16, 5, 16, 8), 2, SLOW, int(0.8 * fastest.peak)).chosen
    assert leaner.peak is not None
    assert leaner.peak <= 0.8 * fastest.peak
    with pytest.raises(MemoryBudgetError, match=r"memory budget of .* what would fit: 8 ranks or pictures of \d+x\d+"):
        decided((1, 16, 5, 16, 8), 2, SLOW, fastest.peak // 4)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_calibrations_are_complete_and_say_where_they_are_from(name: str) -> None:
    one = read(name)
    assert "estimated" in one.origin or "measured" in one.origin
    assert Calibration.from_json(one.as_json()) == one


OLDER = QUICK.as_json().replace('"single"', '"alone"')  # as an earlier version wrote it


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1}', QUICK.as_json().replace("1e-09", "-1"), OLDER])
def test_broken_and_older_calibrations_are_refused_and_measured_again(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(text)
    (tmp_path / "one.json").write_text(text)
    assert calibrate.stored(tmp_path / "one.json") is None
    assert calibrate.stored(tmp_path / "missing.json") is None


def test_the_fit_finds_the_rates_it_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(50):
        flops, size, weights = torch.rand(3, generator=generator).tolist()
        work = Work(1, 1e9 * flops, 1e6 * size, 1e4 * weights)
        samples.append(("kind", work, 1e-5 + 2e-11 * work.flops + 3e-10 * work.bytes))
    found = calibrate.fit(samples)["kind"]
    assert found.calls == pytest.approx(1e-5, rel=0.01)
    assert found.flops == pytest.approx(2e-11, rel=0.01)
    assert found.bytes == pytest.approx(3e-10, rel=0.01)
    assert found.weights == pytest.approx(0, abs=1e-15)


def calibrated(folder: str) -> tuple[Calibration, Calibration, list[str]]:
    join_world(CPU)
    mesh, meeting = mesh_for(Grid(rows=world_size()), CPU), calibrate._meeting
    with (
        patch.dict(os.environ, HALOVAE_CACHE=folder),
        patch.object(calibrate, "SAMPLES", calibrate.SAMPLES[:1]),
        patch.object(calibrate, "_meeting", lambda *args: 100 + meeting(*args)),  # more than anything else takes
    ):
        first = calibrate.calibrated(mesh, torch.float32, native.EAGER)
        return first, calibrate.calibrated(mesh, torch.float32, native.EAGER), os.listdir(folder)


def test_ranks_measure_once_and_agree(tmp_path: Path, ranks: Callable[[int], Ranks]) -> None:
    results = ranks(2).run(calibrated, str(tmp_path))
    assert all(result == results[0] for result in results)
    first, second, files = results[0]
    assert first == second
    assert len(files) == 1
    assert 100 < first.exchange["host"].latency == first.gather["host"].latency < 101
    assert "convolution" in first.together


def decoded(
    z: Tensor, options: dict[str, Any], width: int, family: str = "wan2.1"
) -> tuple[Tensor | None, DecodeReport]:
    stream = halovae.load(random_vae(family, width)).stream(z, **options)
    return stream.join(), stream.shared_report()


CASES = [
    ((1, 3, 8, 8), "2x1"),
    ((1, 4, 8, 8), "1x2"),
    ((2, 1, 8, 8), "2x1x1"),
    ((1, 2, 6, 6), "1x1"),
]


@pytest.mark.parametrize(("shape", "grid"), CASES)
@pytest.mark.parametrize("gather", ["rank0", "all", "none"])
def test_predictions_are_what_ranks_take(
    shape: tuple[int, ...], grid: str, gather: Gather, ranks: Callable[[int], Ranks]
) -> None:
    batch, frames, height, width = shape
    z, layout = latents("wan2.1", frames, height, width, batch), Grid.parse(grid)
    ranks(2).run(decoded, z, {"grid": layout, "gather": gather}, 8)  # records the graph
    results = ranks(2).run(decoded, z, {"grid": layout, "gather": gather}, 8)
    whole, model = reference("wan2.1", z), vae("wan2.1")
    for rank, (out, report) in enumerate(results):
        assert (out is not None) == (rank == 0 or gather != "rank0")
        if out is not None and (gather != "none" or layout.size == 1):
            assert (out - whole).abs().max() <= 1e-4
        took = report.ranks[rank]
        if gather == "none":
            own = (batch // layout.batch, *z.shape[1:])
            plane = replace(layout, batch=1)
            place = rank % plane.size
            cost = traced(lambda z: zoo.decode(model, z), model, own, z.dtype, plane, place, kind="cpu").cost
            assert (cost.messages, cost.bytes_sent) == (took.messages, took.bytes_sent)
            assert cost.peak == pytest.approx(took.memory.peak_allocated, rel=0.1)


def test_auto_decides_the_same_on_all_ranks_and_reports_it(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", 3, 24, 24)
    results = ranks(2).run(decoded, z, {}, 8)
    reports = [report for _, report in results]
    assert reports[0].decision is not None
    assert reports[1].decision is not None
    assert reports[0].decision["chosen"] == reports[1].decision["chosen"]
    assert results[0][0] is not None
    assert (results[0][0] - reference("wan2.1", z)).abs().max() <= 1e-4


def test_a_budget_holds_in_a_real_decode(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", 5, 24, 24)  # maps larger than Winograd's scratch memory, which is as large on a half
    single = ranks(2).run(decoded, z, {"mode": "single"}, 16)[0][1]
    budget = int(0.8 * single.ranks[0].memory.peak_allocated)
    out, report = ranks(2).run(decoded, z, {"memory_budget": budget}, 16)[0]
    assert report.grid in ("2x1", "1x2")
    assert max(rank.memory.peak_allocated for rank in report.ranks) <= budget
    assert out is not None
    assert torch.isfinite(out).all()


def short_of_memory(z: Tensor, width: int) -> tuple[Tensor | None, DecodeReport]:
    """Decode while rank 1 has too little memory for the fastest plan, until all ranks have turned to another."""
    decoder = halovae.load(random_vae("wan2.1", width))
    decoder.decode(z)  # so that oneDNN has made its code: a thread in which it failed once never makes any again
    stream = decoder.stream(z)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if int(os.environ["RANK"]) == 1:
        status = Path("/proc/self/status").read_text()
        used = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))
        resource.setrlimit(resource.RLIMIT_DATA, (used + 16 * 2**20, before[1]))

        def freed(*args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
            drain_peers(*args)

        with patch("halovae.plane.sharded.drain_peers", freed):
            return stream.join(), stream.shared_report()
    return stream.join(), stream.shared_report()


def test_when_memory_runs_out_on_one_rank_all_fall_back_together(tmp_path: Path) -> None:
    z = latents("wan2.1", 5, 12, 20)  # two rows of ranks take a little more than two cols
    ideal = tmp_path / "ideal.json"  # with these rates even a small model is shared
    ideal.write_text(QUICK.as_json())
    with Ranks(2, 1, {**RANK_ENVIRONMENT, "HALOVAE_CALIBRATION": str(ideal)}) as ranks:
        (out, report), (_, other) = ranks.run(short_of_memory, z, 16)
    assert report.fell_back == other.fell_back != ""
    assert report.decision is not None
    assert report.decision["chosen"]["grid"] in report.fell_back
    model = random_vae("wan2.1", 16)
    with torch.inference_mode():
        expected = model.decode(z).sample
    assert out is not None
    assert (out - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode='fast': expected one of auto, single, parallel"),
        ({"memory_budget": 0}, "memory_budget=0: expected a number of bytes"),
        ({"memory_budget": 1000}, "do not fit into a memory budget"),
    ],
)
def test_bad_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halovae.load(vae("wan2.1")).decode(latents("wan2.1"), **options)


def test_the_grid_to_fall_back_on_takes_less() -> None:
    decision = decided((1, 16, 5, 8, 8), 2, SLOW)
    taken = {one.grid: one.peak or 0 for one in decision.candidates}
    leaner = decision.leaner()
    assert leaner is not None
    assert taken[leaner.grid] < (decision.chosen.peak or 0)


def shell(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return f"{done.exit_code} {done.output}"


def test_the_command_ranks_plans_without_a_device() -> None:
    output = shell("plan", "--model", "wan2.1", "--size", "64x64", "--frames", 5, "--num-gpus", 2, "--dtype", "fp32")
    assert output.startswith("0")
    assert "chosen: the fastest" in output
    assert "estimated from data sheets" in output


def test_the_command_draws_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.cli.plan.EXPLORED", (1, 2))
    words = ["plan", "--model", "qwen-image", "--size", "64x64,128x64", "--frames", 1, "--explore", "-o", tmp_path]
    for name in ("plan.png", "plan-2.png"):  # a second run replaces nothing
        assert shell(*words).startswith("0")
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_command_draws_time_over_memory_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "frontier"):
        monkeypatch.setattr(f"halovae.cli.{module}.COUNTS", (2, 64))  # 64 are too many, and left out
    output = shell("plan", "--model", "qwen-image", "--size", "256x256", "--frames", 1, "--frontier", "-o", tmp_path)
    assert output.startswith("0")
    assert "2 strips of rows" in output
    ways = json.loads((tmp_path / "frontier.json").read_text())
    assert ways[0]["strips"] is None
    assert {one["strips"] for one in ways} == {None, "2 strips of rows", "2 strips of cols"}
    assert all(one["peak"] < ways[0]["peak"] for one in ways[1:])
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert shell("plan", "--model", "qwen-image", "--explore", "--frontier").startswith("2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "65x64"], "size 65x64: wan2.1 makes multiples of 8, such as 64x64"),
        (["--frames", "4"], "4 frames: wan2.1 makes 1 + a multiple of 4: 1 or 5"),
        (["--calibration", "abacus"], "neither a file nor one of cpu-epyc-2-cores"),
        (["--memory-budget", "lots"], "expected a size such as 8GiB"),
        (["--memory-budget", "64KiB", "--size", "64x64"], "do not fit into a memory budget"),
    ],
)
def test_the_command_refuses_what_it_cannot_plan(options: list[str], message: str) -> None:
    output = shell("plan", "--model", "wan2.1", "--frames", 1, *options)
    assert output.startswith("2")
    assert message in output.replace("\n", " ")
