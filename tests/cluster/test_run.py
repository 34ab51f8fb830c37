"""Who encodes, what bounds a run, and what the commands refuse."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halovae.cli import dataset
from halovae.cli.main import app
from halovae.cluster.run import Progress, Workers, journal_of, reading_cpus


def test_one_actor_encodes_on_each_device() -> None:
    assert Workers().resources({"CPU": 64, "GPU": 8}) == (8, {"num_gpus": 1, "num_cpus": 0}, 64)
    assert Workers(ranks=4).resources({"CPU": 64, "GPU": 8}) == (2, {"num_gpus": 4, "num_cpus": 0}, 64)
    assert Workers(encoders=3).resources({"CPU": 64, "GPU": 8})[0] == 3
    assert Workers(encoders=9).resources({"CPU": 64, "GPU": 8})[0] == 8
    assert Workers().resources({"CPU": 64, "NPU": 8}) == (8, {"resources": {"NPU": 1}, "num_cpus": 0}, 64)
    with pytest.raises(ValueError, match=r"ranks 16: the cluster has 8 devices \(GPU\)"):
        Workers(ranks=16).resources({"CPU": 64, "GPU": 8})


@pytest.mark.parametrize("cpus", [1, 2, 4, 64])
def test_on_cpus_encoders_of_two_nodes_leave_room_to_read_on_one(cpus: int) -> None:
    count, asked, left = Workers().resources({"CPU": 2 * cpus})
    assert count == cpus
    assert left == cpus
    assert count * asked["num_cpus"] + reading_cpus([cpus]) <= cpus  # of the other node, after the loss of one


def test_one_cpu_suffices_for_all_stages() -> None:
    count, asked, left = Workers().resources({"CPU": 1})
    assert (count, left) == (1, 0.5)
    assert asked["num_cpus"] + reading_cpus([0, 1]) < 1


@pytest.mark.parametrize(
    ("busy", "bound"),
    [
        ({"read": 1, "decode": 2, "encode": 19, "write": 1}, "encode"),
        ({"read": 5, "decode": 30, "encode": 8, "write": 1}, "decode"),
        ({"read": 30, "decode": 5, "encode": 8, "write": 1}, "read"),
        ({"read": 1, "decode": 1, "encode": 4, "write": 1}, "waiting"),
    ],
)
def test_the_busiest_workers_bound_a_run(busy: dict[str, float], bound: str) -> None:
    progress = Progress(100, 40, 40, 0, encoders=2, cpus=4, finished=60, seconds=10, busy=busy)
    assert progress.bound == bound
    assert progress.left_s == 20


def test_nothing_is_predicted_before_anything_is_finished() -> None:
    assert Progress(100, 40, 40, 0, encoders=2, cpus=4, finished=40, seconds=10).left_s is None


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    settings = {"format": "parquet"}
    with (
        journal_of(str(tmp_path), settings),
        pytest.raises(ValueError, match="another run writes to it"),
        journal_of(str(tmp_path), settings),
    ):
        pass


def shown(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["dataset", *map(str, arguments)], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", done.output).split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "100x64"), "size 100x64: wan2.1 takes multiples of 8 pixels"),
        (("--frames", "8"), "8 frames: wan2.1 takes 1 + a multiple of 4, such as 5 or 9"),
        (("--frames", "x"), "--frames x: expected numbers of frames >= 1"),
        (("--buckets", "auto"), "--buckets auto: expected --size with it"),
        (("--buckets", "64x64", "--size", "64x64"), "leave one out"),
        (("--max-rejected", "many"), "--max-rejected many: 'many': expected a number of inputs, or a share"),
        (("--max-source-size", "big"), "--max-source-size big: expected a size such as 8GiB"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_ray_starts(
    wan: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "a.mp4").write_text("")
    assert words in shown("encode", tmp_path, "-o", tmp_path / "out", "--model", wan, *options)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_says_what_to_install(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(purpose: str, *modules: str, extra: str) -> None:
        raise ValueError(f"{purpose} needs pip install 'halovae[{extra}]' (no module {modules[0]})")

    monkeypatch.setattr(dataset, "check_installed", missing)
    said = shown("encode", tmp_path, "-o", tmp_path / "out", "--model", wan)
    assert "halovae dataset needs pip install 'halovae[ray,diffusers]' (no module ray)" in said


def test_a_plan_says_how_many_hours_encoders_are_busy() -> None:
    options = ["--clips", "3600", "--size", "128x128", "--num-gpus", "2", "--dtype", "fp32"]
    done = CliRunner().invoke(app, ["dataset", "plan", "--model", "flux", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    lines = [line.strip("│ ").split("│") for line in done.output.splitlines() if line.startswith("│")]
    rows = [[float(word.replace(",", "")) for word in line] for line in lines]
    assert [row[0] for row in rows] == [1, 2]
    for ranks, seconds, _, rate, hours in rows:
        assert rate == pytest.approx(2 / ranks / seconds, rel=0.02)
        assert hours == pytest.approx(1 / rate, rel=0.02)  # 3600 pictures
