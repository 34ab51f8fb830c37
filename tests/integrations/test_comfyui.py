"""The ComfyUI node pack: alone, with stand-ins for ComfyUI, and in a real ComfyUI that the environment names."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from integrations.hosts import PACK, PLAIN, Host, Interrupted, OwnVAE, Server, checkout, environment, load_pack, serving
from models.original_layouts import wan21, written
from PIL import Image
from safetensors.torch import save_file
from samples import vae as tiny_vae
from torch import Tensor, nn

LATENTS = (1, 16, 3, 36, 28)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """Stand-ins for ComfyUI's modules."""
    found = Host()
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def pack(host: Host) -> Any:
    return load_pack()


def node(pack: Any, name: str) -> Any:
    return pack.NODE_CLASS_MAPPINGS[name]()


def latents(shape: tuple[int, ...] = LATENTS) -> dict[str, Tensor]:
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def clip_vae() -> OwnVAE:
    return OwnVAE(tiny_vae("wan2.1"))


class Pictures(nn.Module):
    """A small autoencoder for pictures, whose decode and encode return tensors, as ComfyUI's do."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.up = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)
        )

    def encode(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(x)
        return found

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.up(z)
        return found


class Reading(Pictures):
    """It reads values of its input, so that no graph of it can be recorded."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z if float(z.mean()) < 0 else z + 1)


class Attending(Pictures):
    """It keeps the function that computes its attention, as ComfyUI's modules do."""

    def __init__(self, seen: set[Any]) -> None:
        super().__init__()
        self.optimized_attention: Any = "ComfyUI's choice"
        self.notes = lambda: seen

    def decode(self, z: Tensor) -> Tensor:
        self.notes().add(self.optimized_attention)
        return super().decode(z)


def test_the_nodes_have_names_inputs_and_a_function(pack: Any) -> None:
    assert pack.NODE_DISPLAY_NAME_MAPPINGS == {
        "HalovaeVAEDecode": "VAE Decode (exact, low memory)",
        "HalovaeVAEEncode": "VAE Encode (exact, low memory)",
    }
    kinds = {"HalovaeVAEDecode": ("LATENT", "IMAGE"), "HalovaeVAEEncode": ("IMAGE", "LATENT")}
    for name, cls in pack.NODE_CLASS_MAPPINGS.items():
        inputs = cls.INPUT_TYPES()["required"]
        taken, made = kinds[name]
        assert [one[0] for one in inputs.values()] == [taken, "VAE", "STRING"]
        assert inputs["memory_budget"][1]["default"] == ""
        assert made in cls.RETURN_TYPES
        assert callable(getattr(cls, cls.FUNCTION))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None), ("  free VRAM ", None), ("6GiB", 6 * 2**30), ("6.5 gb", 6_500_000_000), ("800 MiB", 800 * 2**20),
        ("64KB", 64_000), ("4096", 4096), ("12 B", 12),
    ],
)  # fmt: skip
def test_a_budget_is_read(pack: Any, text: str, size: int | None) -> None:
    assert sys.modules["halovae_pack.budget"].parse_budget(text) == size
    assert all(cls.VALIDATE_INPUTS(memory_budget=text) is True for cls in pack.NODE_CLASS_MAPPINGS.values())


@pytest.mark.parametrize("text", ["six", "-1GiB", "0", "6 TiB", "6 Gi", "6GiB of it"])
def test_another_budget_is_refused_before_anything_runs(pack: Any, text: str) -> None:
    for cls in pack.NODE_CLASS_MAPPINGS.values():
        assert f"memory budget {text!r}: expected a size such as 6GiB" in cls.VALIDATE_INPUTS(memory_budget=text)


def test_a_clip_is_what_the_vae_itself_decodes(host: Host, pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae, given = clip_vae(), latents((1, 16, 3, 8, 6))
    expected = vae.decode(given["samples"])[0]
    with caplog.at_level(logging.INFO):
        (frames,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert vae.own_calls == 1
    assert "at once" in caplog.text
    assert host.loads == [(["the patcher"], {"memory_required": 10**9, "force_full_load": True})]
    assert host.shown[-1] == 100
    assert host.shown == sorted(set(host.shown))


def test_a_budget_is_kept_by_strips(host: Host, pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae, given = clip_vae(), latents()
    expected = vae.decode(given["samples"])[0]
    decode = node(pack, "HalovaeVAEDecode")
    decode.decode(given, vae)
    budget = vae.halovae.report.peak + expected.nbytes  # type: ignore[attr-defined]
    host.shown.clear()
    with caplog.at_level(logging.INFO):
        (frames,) = decode.decode(given, vae, str(budget))
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert "strips of rows" in caplog.text
    assert host.loads[-1][1]["memory_required"] == budget
    assert host.shown[-1] == 100


def test_what_fits_in_no_way_runs_at_once_and_says_so(pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae, given = clip_vae(), latents((1, 16, 1, 8, 8))
    (frames,) = node(pack, "HalovaeVAEDecode").decode(given, vae, "200 KB")
    torch.testing.assert_close(frames, vae.decode(given["samples"])[0], rtol=0, atol=1e-5)
    assert "do not fit into a memory budget" in caplog.text
    assert "It runs at once." in caplog.text


@pytest.mark.parametrize("budget", ["", "strips"])
def test_an_interrupted_decode_ends(host: Host, pack: Any, budget: str) -> None:
    vae, given = clip_vae(), latents(LATENTS if budget else (1, 16, 3, 8, 6))
    decode = node(pack, "HalovaeVAEDecode")
    (expected,) = decode.decode(given, vae)
    if budget:  # what does not fit at once
        budget = str(vae.halovae.report.peak + expected.nbytes)  # type: ignore[attr-defined]
    host.interrupt_at = 40
    host.shown.clear()
    with pytest.raises(Interrupted):
        decode.decode(given, vae, budget)
    assert 40 <= host.shown[-1] < 100
    host.interrupt_at = None
    torch.testing.assert_close(decode.decode(given, vae, budget)[0], expected, rtol=0, atol=1e-5)


def test_pictures_of_a_batch(pack: Any) -> None:
    vae, given = OwnVAE(Pictures()), latents((3, 4, 6, 5))
    (pictures,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
    torch.testing.assert_close(pictures, vae.decode(given["samples"]), rtol=0, atol=1e-6)
    assert pictures.shape == (3, 12, 10, 3)


def test_latents_of_one_frame_are_pictures_for_a_vae_of_pictures(pack: Any) -> None:
    vae, given = OwnVAE(Pictures()), latents((1, 4, 1, 6, 5))
    (pictures,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
    torch.testing.assert_close(pictures, vae.decode(given["samples"][:, :, 0]), rtol=0, atol=1e-6)


class Sound(Pictures):
    """Its result has no rows and cols."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).flatten(2)[..., :-1]


class Failing(Pictures):
    """It calls what tensors without values cannot do."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(torch.from_numpy(z.numpy()))


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (Reading, (1, 4, 6, 5), "reads values that depend on the input"),
        (Sound, (1, 4, 6, 5), "the function made a result of shape [1, 3, 119]"),
        (Failing, (1, 4, 6, 5), "RuntimeError"),
        (Reading, (4, 6, 5), "tensors of shape [4, 6, 5] have no rows and cols"),
    ],
)
def test_what_halovae_cannot_run_is_decoded_by_comfyui(
    pack: Any, caplog: pytest.LogCaptureFixture, module: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    vae, given = OwnVAE(module().requires_grad_(False)), latents(shape)
    (pictures,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
    assert vae.own_calls == 1
    torch.testing.assert_close(pictures, vae.decode(given["samples"]), rtol=0, atol=0)
    assert f"halovae cannot run the decode of {module.__name__}" in caplog.text
    assert reason in caplog.text
    assert "ComfyUI runs it instead" in caplog.text


def test_weights_on_another_device_are_left_to_comfyui(pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae, given = OwnVAE(Pictures()), latents((1, 4, 6, 5))
    vae.first_stage_model.down.to("meta")
    (pictures,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
    torch.testing.assert_close(pictures, vae.decode(given["samples"]), rtol=0, atol=0)
    assert "its weights are on cpu, meta, expected all of them on cpu" in caplog.text


@pytest.mark.parametrize("clip", [False, True])
def test_encodes_are_those_of_the_vae_itself(host: Host, pack: Any, clip: bool) -> None:
    class Clips(Pictures):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv3d(3, 4, 3, (1, 2, 2), 1)  # type: ignore[assignment]

    vae = OwnVAE(Clips() if clip else Pictures())
    pixels = torch.rand(5, 12, 10, 3, generator=torch.Generator().manual_seed(0))
    (found,) = node(pack, "HalovaeVAEEncode").encode(pixels, vae)
    torch.testing.assert_close(found["samples"], vae.encode(pixels), rtol=0, atol=1e-6)
    assert found["samples"].shape == ((1, 4, 5, 6, 5) if clip else (5, 4, 6, 5))
    assert vae.own_calls == 1
    assert host.shown[-1] == 100


def test_weights_that_were_made_in_inference_mode(pack: Any) -> None:
    with torch.inference_mode():  # as ComfyUI runs nodes
        vae, given = OwnVAE(Pictures()), latents((1, 4, 6, 5))
        (pictures,) = node(pack, "HalovaeVAEDecode").decode(given, vae)
        torch.testing.assert_close(pictures, vae.decode(given["samples"]), rtol=0, atol=1e-6)
    assert vae.own_calls == 1


def test_attention_is_pytorchs_while_halovae_records(pack: Any) -> None:
    seen: set[Any] = set()
    module = Attending(seen)
    node(pack, "HalovaeVAEDecode").decode(latents((1, 4, 6, 5)), OwnVAE(module))
    assert seen == {PLAIN}
    assert module.optimized_attention == "ComfyUI's choice"


def test_the_example_workflows_use_the_nodes_as_they_are(pack: Any) -> None:
    own = set(pack.NODE_CLASS_MAPPINGS)
    api = json.loads((PACK / "example_workflows" / "round_trip_api.json").read_text())
    shown = json.loads((PACK / "example_workflows" / "round_trip.json").read_text())
    assert own <= {one["class_type"] for one in api.values()}
    assert sorted(one["class_type"] for one in api.values()) == sorted(one["type"] for one in shown["nodes"])
    for one in api.values():
        if one["class_type"] in own:
            cls = pack.NODE_CLASS_MAPPINGS[one["class_type"]]
            assert set(one["inputs"]) == set(cls.INPUT_TYPES()["required"])
            assert cls.VALIDATE_INPUTS(one["inputs"]["memory_budget"]) is True
    for number, source, out, target, into, kind in shown["links"]:
        ends = {one["id"]: one for one in shown["nodes"]}
        assert number in ends[source]["outputs"][out]["links"]
        assert ends[target]["inputs"][into]["link"] == number
        assert ends[source]["outputs"][out]["name"] == kind == ends[target]["inputs"][into]["type"]


def test_the_registry_finds_what_it_needs() -> None:
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert found["project"]["dependencies"] == (PACK / "requirements.txt").read_text().split()
    assert found["project"]["license"] == {"text": "Apache-2.0"}
    assert found["tool"]["comfy"]["PublisherId"]
    assert found["tool"]["comfy"]["DisplayName"]
    assert (PACK / "README.md").exists()


# In a real ComfyUI.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with a small Wan2.1 VAE in Wan-AI's layout, latents of a clip and of a longer one, and a picture."""
    checkout()
    home = tmp_path_factory.mktemp("comfyui")
    with serving(home) as running:
        save_file(written(tiny_vae("wan2.1"), wan21), home / "models" / "vae" / "wan.safetensors")
        for name, shape in (("clip", LATENTS), ("long", (1, 16, 21, 36, 28))):
            tensors = {"latent_tensor": latents(shape)["samples"], "latent_format_version_0": torch.tensor([])}
            save_file(tensors, home / "input" / f"{name}.latent")
        values = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0))
        Image.fromarray((values * 255).byte().numpy()).save(home / "input" / "picture.png")
        yield running


def decodes(clip: str, **budgets: str | None) -> dict[str, Any]:
    """A workflow that decodes latents once for each name: by ComfyUI's own node (None), or within a budget."""
    found: dict[str, Any] = {
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "wan.safetensors"}},
        "latents": {"class_type": "LoadLatent", "inputs": {"latent": f"{clip}.latent"}},
    }
    for name, budget in budgets.items():
        inputs: dict[str, Any] = {"samples": ["latents", 0], "vae": ["vae", 0]}
        kind = "VAEDecode"
        if budget is not None:
            kind, inputs = "HalovaeVAEDecode", {**inputs, "memory_budget": budget}
        found[f"decode {name}"] = {"class_type": kind, "inputs": inputs}
        saved = {"images": [f"decode {name}", 0], "filename_prefix": name}
        found[f"save {name}"] = {"class_type": "SaveImage", "inputs": saved}
    return found


def saved(server: Server, prefix: str) -> numpy.ndarray[Any, Any]:
    """The pictures of a prefix, as integers."""
    files = sorted((server.home / "output").glob(f"{prefix}_*.png"))
    return numpy.stack([numpy.asarray(Image.open(one)).astype(int) for one in files])


@pytest.mark.timeout(900)
def test_a_workflow_makes_the_pictures_of_comfyuis_own_untiled_decode(server: Server) -> None:
    server.run(decodes("clip", own=None, exact="", strips="65 MB"))
    own, exact, strips = (saved(server, name) for name in ("own", "exact", "strips"))
    assert own.shape == (9, 288, 224, 3)
    assert own.std() > 10  # no plain color
    for found in (exact, strips):
        differing = numpy.abs(found - own)
        assert differing.max() <= 1
        assert (differing > 0).mean() <= 1e-4  # values on the edge between two integers
    assert "halovae decoded latents of shape [1, 16, 3, 36, 28] at once." in server.log
    assert "halovae decoded latents of shape [1, 16, 3, 36, 28] in 4 strips of rows." in server.log
    assert "cannot run" not in server.log
    assert "tiled" not in server.log


@pytest.mark.timeout(900)
def test_the_example_workflow_runs(server: Server) -> None:
    workflow = json.loads((PACK / "example_workflows" / "round_trip_api.json").read_text())
    workflow["1"]["inputs"]["vae_name"] = "wan.safetensors"
    workflow["2"]["inputs"]["image"] = "picture.png"
    workflow["5"]["inputs"]["filename_prefix"] = "trip"
    plain = {
        **workflow,
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 0]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "plain"}},
    }
    server.run(workflow)
    server.run(plain)
    differing = numpy.abs(saved(server, "trip") - saved(server, "plain"))
    assert differing.max() <= 1
    assert (differing > 0).mean() <= 1e-4


@pytest.mark.timeout(900)
def test_a_wrong_budget_is_refused_by_the_server(server: Server) -> None:
    with pytest.raises(AssertionError, match="expected a size such as 6GiB"):
        server.post(decodes("clip", wrong="six"))


@pytest.mark.timeout(900)
def test_an_interrupted_workflow_ends(server: Server) -> None:
    server.run(decodes("clip", warm="free"))
    before = time.monotonic()
    name = server.post(decodes("long", interrupted=""))
    while (found := server.ended(name)) is None:
        assert time.monotonic() < before + 200, server.log
        time.sleep(0.5)
        server.ask("interrupt", {})
    kinds = {kind: about for kind, about in found["status"]["messages"]}
    assert kinds["execution_interrupted"]["node_type"] == "HalovaeVAEDecode"
    assert not list((server.home / "output").glob("interrupted_*"))
    server.run(decodes("clip", after="free VRAM"))  # the server goes on


@pytest.mark.timeout(900)
def test_tensors_are_those_of_comfyui_to_rounding(tmp_path: Path) -> None:
    folder, python = checkout()
    save_file(written(tiny_vae("wan2.1"), wan21), tmp_path / "wan.safetensors")
    script = Path(__file__).with_name("inside_comfyui.py")
    done = subprocess.run(
        [python, str(script), str(folder), str(PACK), str(tmp_path / "wan.safetensors")],
        env=environment(), capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fell back"] is False
    assert "strips" in found["way"]
    assert found["at once"] <= 1e-5
    assert found["in strips"] <= 1e-5
    assert found["encode"] <= 1e-5
