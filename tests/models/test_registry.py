"""Families of other packages: found by their entry points, decoded with, and left out where they are broken."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from halovae import Family
from halovae.models import registry

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"
MAKE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from halovae.io import latents
from halovae.models.architectures import random_vae
folder = Path(sys.argv[1])
vae = random_vae("example")
vae.save_pretrained(folder / "vae")
short = {"encoder": "enc", "decoder": "dec"}
weights = {short[key.partition(".")[0]] + "." + key.partition(".")[2]: one for key, one in vae.state_dict().items()}
save_file(weights, folder / "example.safetensors")
z = torch.randn(1, 8, 6, 10, generator=torch.Generator().manual_seed(0))
save_file({"latents": z}, folder / "latents.safetensors")
torch.save(vae.decode(z).sample, folder / "expected.pt")
"""
DECODE = """
import sys, torch, halovae
from pathlib import Path
from safetensors.torch import load_file
from halovae.distributed.launch import launch
def error(folder, source):
    z = load_file(folder / "latents.safetensors")["latents"]
    found = halovae.load(folder / source).decode(z, grid=halovae.Grid(rows=2), gather="all")
    return float((found - torch.load(folder / "expected.pt")).abs().max())
if __name__ == "__main__":
    for source in ("vae", "example.safetensors"):
        print(launch(2, error, Path(sys.argv[1]), source))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example package is installed, in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(EXAMPLE)], check=True)
    return {**os.environ, "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_family_of_another_package_decodes_on_two_ranks(installed: dict[str, str], tmp_path: Path) -> None:
    for name, script in (("make.py", MAKE), ("decode.py", DECODE)):
        (tmp_path / name).write_text(script)
        found = run(installed, sys.executable, str(tmp_path / name), str(tmp_path))
    for line in found.splitlines():
        assert all(float(error) < 1e-5 for error in line.strip("[]").split(","))
    assert len(found.splitlines()) == 2


@pytest.mark.slow
def test_commands_know_it(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "make.py").write_text(MAKE)
    run(installed, sys.executable, str(tmp_path / "make.py"), str(tmp_path))
    command = [sys.executable, "-m", "halovae.cli.main"]
    assert "ExampleVAE" in run(installed, *command, "inspect", str(tmp_path / "example.safetensors"))
    assert "2x1" in run(installed, *command, "plan", "--model", "example", "--size", "512x512", "--num-gpus", "1,2")
    picture = tmp_path / "picture.png"
    options = ["--model", str(tmp_path / "vae"), "--num-gpus", "2", "-o", str(picture)]
    run(installed, *command, "decode", str(tmp_path / "latents.safetensors"), *options)
    assert picture.exists()


@pytest.mark.parametrize(
    ("value", "loaded", "warning"),
    [
        ("no_such_package:FAMILY", None, "cannot be imported"),
        ("package:FAMILY", 3, "is int, expected halovae.Family"),
        ("package:FAMILY", [Family("flux", "package:VAE")], "registers 'flux', which is taken"),
    ],
)
def test_a_broken_family_is_left_out(monkeypatch: pytest.MonkeyPatch, value: str, loaded: Any, warning: str) -> None:
    class Point(EntryPoint):
        def load(self) -> Any:
            return loaded if loaded is not None else EntryPoint.load(self)

    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registry.families.cache_clear()
    expected = registry.families()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point("one", value, group)])
    registry.families.cache_clear()
    try:
        with pytest.warns(UserWarning, match=warning):
            found = registry.families()
    finally:
        registry.families.cache_clear()
    assert found == expected
    assert found["flux"].class_name == "AutoencoderKL"
