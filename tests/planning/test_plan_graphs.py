"""Plans of any autoencoder: traced graphs predict what ranks do, and the command lists and explains the plans."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from halovae.cli import plan as plan_command
from halovae.cli.main import app
from halovae.device.memory import LiveBytes
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.distributed.transport import Link
from halovae.errors import MemoryBudgetError, UnplannableError
from halovae.grid import Grid
from halovae.models import zoo
from halovae.models.architectures import latent_shape, meta_vae, random_vae
from halovae.plane import Plane
from halovae.plane.trace import trace
from halovae.planning.calibration import OTHER, Rates, read
from halovae.planning.decision import MARGIN, WORTH
from halovae.planning.graphs import traced
from halovae.planning.search import Search

CPU = torch.device("cpu")
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
TINY = {
    "AutoencoderKL": (1, 4, 24, 20),
    "AutoencoderKLHunyuanVideo": (1, 4, 9, 12, 10),  # two tiles of frames and a shorter one
    "AutoencoderKLCogVideoX": (1, 4, 5, 12, 10),
    "AutoencoderDC (conv)": (1, 4, 24, 20),
}
CASES = list(zip(TINY, ["2x2", "3x1", "2x1", "1x3"], strict=True))


def measured(name: str, grid: Grid) -> list[tuple[int, int, int]]:
    """Return the messages, bytes sent, and peak of live bytes of each rank that replays its program."""
    shape, module = TINY[name], zoo.build(ENTRIES[name])
    x = torch.randn(shape)

    def rank(mesh: Mesh) -> tuple[int, int, int]:
        program = trace(lambda z: zoo.decode(module, z), [module], mesh, shape, x.dtype, CPU)
        local = Plane(mesh).scatter(x).local
        with LiveBytes() as live:
            for _ in program.chunks(local.clone(), mesh):
                pass
        return mesh.traffic.messages, mesh.traffic.bytes, live.peak

    return on_threads(grid, CPU, rank)


def test_tensors_that_modules_make_on_import_have_data() -> None:
    """Cosmos' module has wavelets. It is imported at the first use of its class, which may be in a plan."""
    script = (
        "import torch; from halovae.models.architectures import meta_vae; meta_vae('cosmos', torch.bfloat16); "
        "from diffusers.models.autoencoders import autoencoder_kl_cosmos as cosmos; "
        "assert not any(one.is_meta for one in cosmos._WAVELETS.values())"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_predictions_are_what_ranks_take(name: str, grid: str) -> None:
    assert getattr(diffusers, ENTRIES[name].class_name)  # imports the module first
    with torch.device("meta"):
        module = ENTRIES[name].make().requires_grad_(False)
    for rank, (messages, sent, peak) in enumerate(measured(name, Grid.parse(grid))):
        cost = traced(lambda z: zoo.decode(module, z), module, TINY[name], torch.float32, Grid.parse(grid), rank).cost
        assert (cost.messages, cost.bytes_sent) == (messages, sent)
        assert cost.peak == pytest.approx(peak, rel=0.05)


def test_a_call_that_repeats_counts_each_time() -> None:
    """It is traced once, but its FLOPs are counted as often as the module computes them."""
    name = "AutoencoderKLHunyuanVideo"
    module = zoo.build(ENTRIES[name])
    found = traced(lambda z: zoo.decode(module, z), module, TINY[name], torch.float32, Grid())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        zoo.decode(module, torch.randn(TINY[name]))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert found.cost.kinds()["convolution"].flops == counted
    assert not any("forward" in vars(one) for one in module.modules())


def search(shape: tuple[int, ...] = (1, 16, 32, 32), **options: Any) -> Search:
    """Return a search for a tiny autoencoder. Time is proportional to FLOPs, and messages cost only a latency."""
    assert diffusers.AutoencoderKL  # imports the module first
    with torch.device("meta"):
        module = ENTRIES["AutoencoderKL (no quant_conv)"].make()
    rates = {OTHER: Rates(flops=1e-9), "convolution": Rates(flops=1e-9), "linear": Rates(flops=1e-9)}
    exchange = {"host": Link(options.pop("latency", 0), 0)}
    free = {"host": Link(0, 0)}
    ideal = replace(read("cuda-h200"), single=rates, together=rates, exchange=exchange, gather=free)
    return Search(lambda z: zoo.decode(module, z), module, shape, torch.float32, ideal, **options)


def test_more_ranks_are_chosen_where_messages_cost_little() -> None:
    found = search()
    decisions = {world: found.decide(world) for world in (8, 4, 2, 1)}
    assert [one.chosen.grid.size for one in decisions.values()] == [8, 4, 2, 1]
    assert decisions[1].chosen.seconds / decisions[8].chosen.seconds == pytest.approx(8, rel=0.2)
    for decision in decisions.values():
        assert decision.candidates[0].verdict.startswith("chosen")
        unseen = [one for one in decision.candidates if one.peak is None]
        assert all(one.verdict.startswith("not traced") for one in unseen)
        assert all(one.seconds * (1 + WORTH) >= decision.chosen.seconds for one in unseen)
    assert found.price(Grid(rows=3)).seconds >= next(
        one.seconds for one in decisions[4].candidates if str(one.grid) == "3x1"
    )  # a grid that was not traced takes at least the time that was given


def test_one_rank_is_chosen_where_messages_cost_more_than_they_save() -> None:
    assert search(latency=1).decide(4).chosen.grid.size == 1


def test_whole_items_need_no_messages() -> None:
    found = search(batch=4, latency=1e-3)
    assert str(found.decide(4).chosen.grid) == "4x1x1"
    single, shared = found.price(Grid()), found.price(Grid(batch=2, rows=2))
    assert single.seconds == pytest.approx(4 * found.price(Grid(batch=4)).seconds)
    assert shared.messages == 2 * (found.traced(Grid(rows=2)).cost.messages)
    assert shared.peak == found.traced(Grid(rows=2)).cost.peak


def test_a_budget_is_kept_and_an_error_says_what_would_fit() -> None:
    halves = search().price(Grid(rows=2)).peak
    assert halves is not None
    found = search(latency=1, budget=int(halves * (1 + MARGIN)) + 1)  # one rank would be faster
    decision = found.decide(2)
    assert decision.chosen.grid.size == 2
    assert "does not fit into the memory budget" in {one.verdict for one in decision.candidates}
    with pytest.raises(MemoryBudgetError, match=r"the leanest way \(1x1.*\) takes .* what would fit: 2 ranks"):
        found.decide(1)


def test_smaller_pictures_that_a_model_does_not_take_are_not_advised() -> None:
    module = nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect").requires_grad_(False)
    found = Search(module, module, (1, 4, 8, 8), torch.float32, read("cuda-h200"), budget=1)
    with pytest.raises(MemoryBudgetError, match="the leanest way") as raised:
        found.decide(1)
    assert "pictures of" not in str(raised.value)


def test_replicated_operators_are_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x)

    module = Sorted()
    found = Search(module, module, (1, 1, 16, 16), torch.float32, read("cuda-h200"))
    verdicts = [one.verdict for one in found.decide(2).candidates if one.grid.size == 2]
    assert any("aten.linalg_matrix_exp.default runs replicated" in verdict for verdict in verdicts)


def test_a_module_that_depends_on_data_cannot_be_planned() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(UnplannableError, match="Branching cannot be planned: .* reads values that depend on the input"):
        traced(Branching(), Branching(), (1, 1, 4, 4), torch.float32, Grid())


@pytest.mark.parametrize(
    ("name", "size", "frames", "shape"),
    [
        ("flux", (64, 32), 1, (1, 16, 4, 8)),
        ("sana", (64, 32), 1, (1, 32, 1, 2)),
        ("hunyuan-video", (64, 32), 129, (1, 16, 33, 4, 8)),
        ("hunyuan-video-1.5", (64, 32), 121, (1, 32, 31, 2, 4)),
        ("ltx-2", (64, 32), 121, (1, 128, 16, 1, 2)),
        ("cogvideox", (64, 32), 49, (1, 16, 13, 4, 8)),
        ("mochi", (64, 32), 163, (1, 12, 28, 4, 8)),
        ("cosmos", (64, 32), 121, (1, 16, 16, 4, 8)),
        ("allegro", (64, 32), 88, (1, 4, 22, 4, 8)),
        ("qwen-image-2.1", (64, 32), 1, (1, 64, 1, 2, 4)),
    ],
)
def test_the_latents_of_a_size(name: str, size: tuple[int, int], frames: int, shape: tuple[int, ...]) -> None:
    assert latent_shape(meta_vae(name, torch.bfloat16), name, size, frames) == shape


def test_random_weights_come_in_true_sizes() -> None:
    vae = random_vae("sd", dtype=torch.bfloat16)
    assert {one.dtype for one in vae.parameters()} == {torch.bfloat16}
    assert torch.equal(vae.decoder.conv_in.weight, random_vae("sd", dtype=torch.bfloat16).decoder.conv_in.weight)
    with pytest.raises(ValueError, match="flux only comes in its true width"):
        random_vae("flux", 8)
    with pytest.raises(ValueError, match=r"expected one of wan2.1, .*hunyuan-video"):
        random_vae("abacus")


def shell(*words: object) -> str:
    done = CliRunner().invoke(app, ["plan", *map(str, words)])
    return f"{done.exit_code} {done.output}".replace("\n", " ")


def test_the_command_plans_for_several_numbers_of_devices() -> None:
    output = shell("--model", "flux", "--size", "256x256", "--num-gpus", "1,2")
    assert output.startswith("0")
    assert output.count("chosen: the fastest") == 2
    assert "flux, latents 1x16x32x32" in output
    output = shell("--model", "qwen-image", "--size", "64x64", "--frames", 1, "--num-gpus", "1,2")
    assert output.startswith("0")
    assert output.count("chosen: the fastest") == 2


def test_the_command_plans_clips() -> None:
    output = shell("--model", "hunyuan-video", "--size", "128x128", "--frames", 5, "--num-gpus", 2)
    assert output.startswith("0")
    assert "latents 1x16x2x16x16, up to 2 ranks" in output


def test_the_command_says_where_nothing_fits() -> None:
    options = ["--model", "flux", "--size", "256x256", "--memory-budget", "60MiB"]
    output = shell(*options, "--num-gpus", "1,4")
    assert output.startswith("0")
    assert "nothing fits: the leanest way (1x1" in output
    assert output.count("chosen: ") == 1
    assert shell(*options, "--num-gpus", "1").startswith("2")


def test_the_command_plans_a_folder_of_any_autoencoder(tmp_path: Path) -> None:
    zoo.build(ENTRIES["AutoencoderTiny"]).save_config(tmp_path)  # type: ignore[operator]
    output = shell("--model", tmp_path, "--size", "64x64", "--num-gpus", 2)
    assert output.startswith("0")
    assert "AutoencoderTiny, latents 1x4x16x16" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "flux", "--size", "100x64"], "size 100x64: flux makes multiples of 8, such as 96x64"),
        (["--model", "flux", "--frames", "5"], "5 frames: flux makes pictures: --frames 1"),
        (["--model", "hunyuan-video", "--frames", "128"], "makes 1 + a multiple of 4: 125 or 129"),
        (["--model", "allegro", "--frames", "81", "--size", "64x64"], "allegro makes multiples of 4: 80 or 84"),
        (["--model", "flux", "--num-gpus", "1,many"], "expected numbers of devices >= 1, such as 8 or 1,2,4,8"),
    ],
)
def test_the_command_refuses_what_it_cannot_plan(options: list[str], message: str) -> None:
    output = shell(*options)
    assert output.startswith("2")
    assert message in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AutoencoderOobleck", "AutoencoderOobleck cannot be planned: audio"),
        ("LTX2VideoDiffusionDecoderModel", "cannot be planned: built on flex_attention"),
        ("Abacus", "'Abacus' is neither a class of the installed diffusers nor a registered one"),
        ("UNet2DModel", "'UNet2DModel' is neither a class of the installed diffusers"),
    ],
)
def test_the_command_refuses_models_that_have_no_plan(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    output = shell("--model", tmp_path, "--size", "64x64")
    assert output.startswith("2")
    assert message in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--model flux --size 4096x4096 --num-gpus 1,2,4,8",
        "--model hunyuan-video --size 1280x720 --frames 129 --num-gpus 8",
    ],
)
def test_true_sizes_are_planned(words: str) -> None:
    """The commands of the documentation, each in a process of its own."""
    subprocess.run(
        [sys.executable, "-c", "from halovae.cli.main import app; app()", "plan", *words.split()], check=True
    )


def test_the_stand_in_for_the_compiler_leaves_functions_as_they_are() -> None:
    stand_in = plan_command._Compiler()
    assert stand_in.disable(abs) is abs
    assert stand_in.disable(recursive=False)(abs) is abs
    assert not hasattr(stand_in, "__wrapped__")
    assert stand_in.config is torch._dynamo.config  # anything else comes from the compiler


def test_the_compiler_replaces_its_stand_in() -> None:
    code = (
        "import sys, torch; from halovae.cli.plan import _Compiler; sys.modules['torch._dynamo'] = _Compiler(); "
        "from torch._dynamo.utils import counters; import torch._dynamo.config; "
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2.0", done.stderr
