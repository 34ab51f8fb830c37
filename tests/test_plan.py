"""Plans, their predictions against real decodes, and what happens where memory ends."""

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import latents, reference, vae
from torch import Tensor
from typer.testing import CliRunner

import halovae
import halovae.stream
from halovae import Grid, fallback, kernels
from halovae.bench.models import random_vae
from halovae.bench.ranks import Ranks
from halovae.cli.main import app
from halovae.geometry import Span
from halovae.lines import join_world, world_size
from halovae.loop import Gather
from halovae.mesh import mesh_for
from halovae.planning import calibrate
from halovae.planning.calibration import OTHER, Calibration, Line, Rates, read, shipped
from halovae.planning.choose import Decision, Question, TooLittleMemory, choose, layouts
from halovae.planning.cost import Cost, Work, walk
from halovae.planning.plan import Plan, Stage
from halovae.platform import RANK_ENVIRONMENT
from halovae.report import DecodeReport

CPU = torch.device("cpu")
FREE, RATES = Line(0, 0), Rates(flops=1e-9, weights=1e-4)
# Where nothing takes time but FLOPs, and weights for each pass: larger chunks are faster.
IDEAL = Calibration(
    "ideal",
    "cpu",
    "made up",
    {OTHER: RATES},
    {OTHER: RATES},
    {"host": FREE},
    {"host": FREE},
    FREE,
)
# Where only FLOPs take time.
QUICK = replace(IDEAL, alone={OTHER: Rates(flops=1e-9)}, together={OTHER: Rates(flops=1e-9)})
# Where a message takes as long as a GFLOP.
SLOW = replace(QUICK, exchange={"host": Line(1, 0)}, gather={"host": Line(1, 0)})


def question(shape: tuple[int, ...], world: int, **options: Any) -> Question:
    return replace(Question(halovae.load(vae("wan2.1")).config, shape, torch.float32, world), **options)


SEVERAL = Plan((Stage(Span(0, 1), Grid()), Stage(Span(1, 2), Grid())))


def kept_apart(stages: tuple[Stage, ...]) -> str:
    return Plan(stages).grid


def test_layouts_hold_each_latent_once_and_use_up_to_all_ranks() -> None:
    for batch, world in ((1, 1), (1, 3), (3, 2), (4, 2), (5, 4), (2, 8)):
        found = layouts(batch, world, 5, 3)
        assert len(set(found)) == len(found)
        for stages in found:
            assert [item for stage in stages for item in range(stage.items.start, stage.items.stop)] == [*range(batch)]
            assert all(stage.grid.size <= world for stage in stages)
            for stage in stages:
                stage.grid.shards(stage.items.size, 5, 3)  # does not raise


def test_layouts_of_an_uneven_batch_give_whole_items_first() -> None:
    grids = {kept_apart(stages) for stages in layouts(3, 2, 8, 8)}
    assert "2 on 2x1x1 then 1 on 2x1" in grids
    assert {"1x1", "2x1", "1x2", "2x1x1"} <= grids


def test_where_messages_cost_nothing_all_ranks_share_and_where_they_cost_all_none_do() -> None:
    assert choose(question((1, 16, 1, 12, 12), 4), QUICK).chosen.ranks == 4
    assert choose(question((1, 16, 1, 12, 12), 4), SLOW).chosen.ranks == 1


def test_whole_items_travel_least() -> None:
    chosen = choose(question((4, 16, 1, 12, 12), 2, gather="none"), SLOW).chosen
    assert str(chosen.plan.stages[0].grid) == "2x1x1"
    assert chosen.messages == 0


def test_idle_ranks_are_left_over_where_they_would_not_help() -> None:
    chosen = choose(question((4, 16, 1, 1, 1), 5), QUICK).chosen
    assert chosen.ranks == 4


def test_a_chunk_that_gains_nothing_hides_no_larger_one() -> None:
    decision = choose(question((1, 16, 9, 4, 4), 1), QUICK)
    assert {one.plan.chunk for one in decision.candidates} == {1, 2, 4, 8}


def test_a_decision_names_its_losers() -> None:
    decision = choose(question((1, 16, 5, 8, 8), 2), SLOW)
    assert decision.chosen.verdict.startswith("chosen")
    assert all(one.verdict and not one.verdict.startswith("chosen") for one in decision.candidates[1:])
    assert "made up" in decision.calibration
    assert decision.as_dict()["chosen"]["plan"] == str(decision.chosen.plan)


def test_a_budget_is_kept_or_refused_with_what_would_fit() -> None:
    ask = question((1, 16, 5, 8, 8), 2)
    fastest = choose(ask, IDEAL).chosen
    assert fastest.peak is not None
    leaner = choose(replace(ask, budget=int(0.6 * fastest.peak)), IDEAL).chosen
    assert leaner.peak is not None
    assert leaner.peak <= 0.6 * fastest.peak
    with pytest.raises(TooLittleMemory, match=r"memory budget of .* what would fit: .*pictures of"):
        choose(replace(ask, budget=fastest.peak // 20), IDEAL)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_calibrations_are_whole_and_say_where_they_are_from(name: str) -> None:
    one = read(name)
    assert "estimated" in one.origin or "measured" in one.origin
    assert Calibration.from_json(one.as_json()) == one


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1}', IDEAL.as_json().replace("1e-09", "-1")])
def test_broken_calibrations_are_refused_and_measured_anew(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no calibration"):
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
    os.environ["HALOVAE_CACHE"] = folder
    calibrate.SAMPLES = calibrate.SAMPLES[:1]
    join_world(CPU)
    mesh = mesh_for(Grid(rows=world_size()), CPU)
    meeting = calibrate._meeting
    calibrate._meeting = lambda *given: 100 + meeting(*given)  # beyond what anything else takes
    first = calibrate.calibrated(mesh, torch.float32, kernels.EAGER)
    return first, calibrate.calibrated(mesh, torch.float32, kernels.EAGER), os.listdir(folder)


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
    ((1, 3, 8, 8), Plan.of(1, Grid(rows=2))),
    ((1, 9, 8, 8), Plan.of(1, Grid(cols=2), 2, {"": 1, "up3": 3, "conv_out": 2})),
    ((2, 1, 8, 8), Plan.of(2, Grid(batch=2))),
    ((3, 3, 7, 6), Plan((Stage(Span(0, 2), Grid(batch=2)), Stage(Span(2, 3), Grid(rows=2))))),
    ((1, 2, 6, 6), Plan.of(1, Grid())),
]


@pytest.mark.parametrize(("shape", "plan"), CASES)
@pytest.mark.parametrize("gather", ["rank0", "all"])
def test_predictions_are_what_ranks_take(
    shape: tuple[int, ...], plan: Plan, gather: Gather, ranks: Callable[[int], Ranks]
) -> None:
    batch, frames, height, width = shape
    z = latents("wan2.1", frames, height, width, batch)
    results = ranks(2).run(decoded, z, {"plan": plan, "gather": gather}, 8)
    for rank, (out, report) in enumerate(results):
        assert (out is not None) == (rank == 0 or gather == "all")
        if out is not None:
            assert (out - reference("wan2.1", z)).abs().max() <= 1e-4
        took = report.ranks[rank]
        config = halovae.load(vae("wan2.1")).config
        if plan.stages[0].grid.size == 2:
            cost = walk(config, z.shape, torch.float32, plan, gather=gather, rank=rank)
            assert (cost.messages, cost.bytes_sent) == (took.messages, took.bytes_sent)
            assert cost.peak == pytest.approx(took.memory.peak_allocated, rel=0.1)


def test_auto_decides_alike_on_all_ranks_and_tells(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", 3, 24, 24)
    results = ranks(2).run(decoded, z, {}, 8)
    reports = [report for _, report in results]
    assert reports[0].decision is not None
    assert reports[1].decision is not None
    assert reports[0].decision["chosen"] == reports[1].decision["chosen"]
    assert results[0][0] is not None
    assert (results[0][0] - reference("wan2.1", z)).abs().max() <= 1e-4


def predicted(shape: tuple[int, ...], plan: Plan, family: str) -> Cost:
    """What this rank is to take: how many threads it has decides how much scratch there is."""
    config = halovae.load(random_vae(family, 8)).config
    return walk(config, shape, torch.float32, plan, rank=int(os.environ["RANK"]) % plan.stages[0].grid.size)


BANDED = [
    ("wan2.1", Plan.of(1, Grid(), 2, bands=2)),
    ("wan2.1", Plan.of(1, Grid(rows=2), bands=2)),
    ("wan2.1", Plan.of(1, Grid(cols=2), bands=2)),
    ("wan2.2-5b", Plan.of(1, Grid(rows=2), bands=2)),
]


@pytest.mark.parametrize(("family", "plan"), BANDED)
def test_bands_are_exact_and_take_what_was_predicted(family: str, plan: Plan, ranks: Callable[[int], Ranks]) -> None:
    z = latents(family, 3, 33, 4)
    results = ranks(2).run(decoded, z, {"plan": plan}, 8, family)
    out, report = results[0]
    model = random_vae(family, 8)
    with torch.inference_mode():
        expected = model.decode(z).sample
    assert out is not None
    assert (out - expected).abs().max() <= 1e-4
    assert report.bands == plan.bands
    costs = ranks(2).run(predicted, z.shape, plan, family)
    for cost, took in list(zip(costs, report.ranks, strict=True))[: plan.stages[0].grid.size]:
        assert (cost.messages, cost.bytes_sent) == (took.messages, took.bytes_sent)
        assert cost.peak == pytest.approx(took.memory.peak_allocated, rel=0.1)


def test_bands_are_for_what_fits_no_other_way() -> None:
    ask = question((1, 16, 5, 60, 6), 1)
    leanest = choose(replace(ask, chunk=1), IDEAL).chosen
    assert leanest.peak is not None
    budget = int(0.9 * leanest.peak)
    banded = choose(replace(ask, budget=budget), IDEAL).chosen
    assert banded.plan.bands > 1
    assert banded.peak is not None
    assert 1.15 * banded.peak <= budget


def test_a_budget_holds_in_a_real_decode(ranks: Callable[[int], Ranks]) -> None:
    z = latents("wan2.1", 9, 16, 16)
    free = ranks(2).run(decoded, z, {}, 16)[0][1]
    peak = max(rank.memory.peak_allocated for rank in free.ranks)
    budget = int(0.6 * peak)
    out, report = ranks(2).run(decoded, z, {"memory_budget": budget}, 16)[0]
    assert max(rank.memory.peak_allocated for rank in report.ranks) <= budget
    assert out is not None
    assert torch.isfinite(out).all()


def short_of_memory(z: Tensor, width: int) -> tuple[Tensor | None, DecodeReport]:
    """A decode in which rank 1 cannot have what the fastest plan needs, until all ranks have turned to another."""
    decoder = halovae.load(random_vae("wan2.1", width))
    decoder.decode(z)  # oneDNN has made its code by then: a thread in which that once failed can never make any again
    stream = decoder.stream(z)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if int(os.environ["RANK"]) == 1:
        status = Path("/proc/self/status").read_text()
        used = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))
        resource.setrlimit(resource.RLIMIT_DATA, (used + 16 * 2**20, before[1]))
        real = fallback.drain_peers

        def freed(*args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
            real(*args)

        with patch.object(halovae.stream, "drain_peers", freed):
            return stream.join(), stream.shared_report()
    return stream.join(), stream.shared_report()


def test_when_memory_runs_out_on_one_rank_all_fall_back_together(tmp_path: Path) -> None:
    z = latents("wan2.1", 5, 20, 20)
    ideal = tmp_path / "ideal.json"  # by which so small a model is shared as well
    ideal.write_text(IDEAL.as_json())
    with Ranks(2, 1, {**RANK_ENVIRONMENT, "HALOVAE_CALIBRATION": str(ideal)}) as ranks:  # maps are given back at once
        (out, report), (_, other) = ranks.run(short_of_memory, z, 16)
    assert report.fell_back == other.fell_back != ""
    assert report.decision is not None
    assert report.decision["chosen"]["plan"] in report.fell_back
    model = random_vae("wan2.1", 16)
    with torch.inference_mode():
        expected = model.decode(z).sample
    assert out is not None
    assert (out - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan.of(2, Grid())}, "expected each of 1 once"),
        ({"plan": Plan.of(1, Grid(), bands=9)}, "bands=9, expected 1 to"),
        ({"plan": SEVERAL, "gather": "none"}, "gather='none' needs a single one"),
        ({"plan": Plan.of(1, Grid(rows=4))}, "needs more ranks than the 1"),
        ({"plan": Plan.of(1, Grid()), "chunk": 2}, "leave mesh, grid, chunk and halo_depth out"),
        ({"mode": "fast"}, "mode='fast': expected one of auto, single, parallel"),
        ({"memory_budget": 0}, "memory_budget=0: expected a number of bytes"),
        ({"memory_budget": 1000}, "do not fit into a memory budget"),
    ],
)
def test_bad_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halovae.load(vae("wan2.1")).decode(latents("wan2.1"), **options)


def test_a_leaner_plan_takes_less() -> None:
    decision: Decision = choose(question((1, 16, 5, 8, 8), 2), IDEAL)
    leaner = decision.leaner()
    assert len(leaner) == 1
    taken = {str(one.plan): one.peak or 0 for one in decision.candidates}
    assert taken[str(leaner[0])] < (decision.chosen.peak or 0)


def test_latents_of_different_lengths_share_a_batch() -> None:
    one, other = latents("wan2.1", 3, 6, 5)[0], latents("wan2.1", 1, 6, 5, seed=1)[0]
    decoded = halovae.load(vae("wan2.1")).decode_many([one, other])
    for z, frames in zip((one, other), decoded, strict=True):
        expected = reference("wan2.1", z.unsqueeze(0))[0]
        assert frames is not None
        assert frames.shape == expected.shape
        assert (frames - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shapes", [[], [(16, 1, 4, 4), (16, 1, 4, 5)], [(1, 16, 1, 4, 4)]])
def test_latents_that_cannot_share_a_batch_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        halovae.load(vae("wan2.1")).decode_many([torch.zeros(shape) for shape in shapes])


def shell(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return f"{done.exit_code} {done.output}"


def test_the_command_ranks_plans_without_a_device() -> None:
    said = shell("plan", "--model", "wan2.1", "--size", "64x64", "--frames", 5, "--num-gpus", 2, "--dtype", "fp32")
    assert said.startswith("0")
    assert "chosen: the fastest" in said
    assert "estimated from data sheets" in said


def test_the_command_draws_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.cli.plan.EXPLORED", (1, 2))
    words = ["plan", "--model", "qwen-image", "--size", "64x64,128x64", "--frames", 1, "--explore", "-o", tmp_path]
    for name in ("plan.png", "plan-2.png"):  # a second run replaces nothing
        assert shell(*words).startswith("0")
        assert (tmp_path / name).stat().st_size > 10_000


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
    said = shell("plan", "--model", "wan2.1", "--frames", 1, *options)
    assert said.startswith("2")
    assert message in said.replace("\n", " ")
