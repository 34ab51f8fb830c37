"""What stands in for ComfyUI where it is not installed, and how to run it where it is."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
PLAIN = object()  # stands for ComfyUI's attention by PyTorch


class Interrupted(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


class Host:
    """ComfyUI's modules that the pack uses, and what the pack did with them.

    Attributes:
        loads: the arguments of each call of `load_models_gpu`.
        shown: the values of progress bars.
        interrupt_at: the value of the progress bar at which the user interrupts.
    """

    def __init__(self) -> None:
        self.loads: list[tuple[list[Any], dict[str, Any]]] = []
        self.shown: list[int] = []
        self.interrupt_at: int | None = None

    def modules(self) -> dict[str, ModuleType]:
        """The modules by name."""
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                assert total == 100

            def update_absolute(self, value: int) -> None:
                host.shown.append(value)

        def throw() -> None:
            if self.interrupt_at is not None and self.shown and self.shown[-1] >= self.interrupt_at:
                raise Interrupted

        names = (
            "comfy", "comfy.model_management", "comfy.utils", "comfy.ldm", "comfy.ldm.modules",
            "comfy.ldm.modules.diffusionmodules", "comfy.ldm.modules.diffusionmodules.model",
        )  # fmt: skip
        found: dict[str, Any] = {name: ModuleType(name) for name in names}
        for name in names[1:]:
            parent, _, own = name.rpartition(".")
            setattr(found[parent], own, found[name])
        found["comfy.model_management"].load_models_gpu = lambda models, **how: self.loads.append((models, how))
        found["comfy.model_management"].throw_exception_if_processing_interrupted = throw
        found["comfy.utils"].ProgressBar = ProgressBar
        found[names[-1]].pytorch_attention = PLAIN
        return found


class OwnVAE:
    """Stands for ComfyUI's `VAE` around a module: what the pack reads of it, and its plain decode and encode."""

    device = output_device = torch.device("cpu")
    patcher = "the patcher"
    not_video = False

    def __init__(self, module: nn.Module) -> None:
        self.first_stage_model = module
        self.vae_dtype = next(module.parameters()).dtype
        self.latent_dim = 3 if any(isinstance(one, nn.Conv3d) for one in module.modules()) else 2
        self.own_calls = 0

    def throw_exception_if_invalid(self) -> None:
        pass

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> int:
        return 10**9

    memory_used_encode = memory_used_decode

    def process_output(self, image: Tensor) -> Tensor:
        return ((image + 1) / 2).clamp(0, 1)

    def process_input(self, image: Tensor) -> Tensor:
        return image * 2 - 1

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """`[B, T, H, W, 3]` or `[B, H, W, 3]`."""
        self.own_calls += 1
        with torch.no_grad():
            found = self.first_stage_model.decode(latents.to(self.vae_dtype))  # type: ignore[operator]
        return self.process_output(getattr(found, "sample", found).float()).movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        self.own_calls += 1
        x = pixels.movedim(-1, 1)
        x = x.movedim(1, 0).unsqueeze(0) if self.latent_dim == 3 else x
        with torch.no_grad():
            found = self.first_stage_model.encode(self.process_input(x).to(self.vae_dtype))  # type: ignore[operator]
        return found.float()


def load_pack(name: str = "halovae_pack") -> Any:
    """Import the pack as ComfyUI does: from its folder, under another name."""
    for one in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
        del sys.modules[one]
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkout() -> tuple[Path, str]:
    """The folder of a ComfyUI checkout, and the Python that has its requirements and halovae's."""
    folder, python = os.environ.get("HALOVAE_COMFYUI"), os.environ.get("HALOVAE_COMFYUI_PYTHON")
    if not folder or not python:
        pytest.skip("HALOVAE_COMFYUI and HALOVAE_COMFYUI_PYTHON name no ComfyUI checkout and its Python")
    return Path(folder), python


def environment() -> dict[str, str]:
    """The environment of ComfyUI's process: this checkout of halovae, without its cache of graphs."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HALOVAE_GRAPHS": "0", "OMP_NUM_THREADS": "1"}


class Server:
    """A ComfyUI server.

    Attributes:
        home: its folder of models, inputs, and outputs.
        log: what it printed.
    """

    def __init__(self, home: Path, port: int) -> None:
        self.home, self._address = home, f"http://127.0.0.1:{port}"
        self._log = home / "log.txt"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON that a route answers with; POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def post(self, workflow: dict[str, Any]) -> str:
        """Post a workflow. Return its id.

        Raises:
            AssertionError: the server refuses it.
        """
        try:
            return str(self.ask("prompt", {"prompt": workflow})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def ended(self, name: str) -> dict[str, Any] | None:
        """What the history has of a workflow; None until it has ended."""
        found: dict[str, Any] | None = self.ask(f"history/{name}").get(name)
        return found

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow. Return what the history has of it."""
        name, end = self.post(workflow), time.monotonic() + 600
        while (found := self.ended(name)) is None:
            assert time.monotonic() < end, self.log
            time.sleep(0.2)
        assert found["status"]["status_str"] == "success", (found["status"], self.log)
        return found


@contextmanager
def serving(home: Path) -> Iterator[Server]:
    """Run ComfyUI on the CPU with the pack as its only custom node, until the context ends."""
    folder, python = checkout()
    for name in ("models/vae", "input", "output", "custom_nodes", "user", "temp"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "custom_nodes" / "halovae").symlink_to(PACK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python, "main.py", "--cpu", "--fp32-vae", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes",
        "--disable-auto-launch", "--base-directory", str(home), "--database-url", "sqlite:///:memory:",
    ]  # fmt: skip
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    server = Server(home, port)
    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None, server.log
            assert time.monotonic() < end, server.log
            try:
                server.ask("system_stats")
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
