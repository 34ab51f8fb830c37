"""Ranks for tests: real gloo processes, started once and shared by all tests."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Where there is no CUDA device its kernels run on the CPU, by Triton's interpreter. Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from playwright.sync_api import Browser, sync_playwright
from typer.testing import CliRunner

from halovae.cli.main import app
from halovae.distributed.ranks import Ranks
from halovae.kernels import native

# Plans by figures that do not change, and no measurement in each group of ranks.
os.environ["HALOVAE_CALIBRATION"] = "cpu-epyc-2-cores"
# Models are tiny: more threads only get into each other's way.
torch.set_num_threads(1)
# Tests trace their own graphs. The user's cache gets no more than compiled kernels.
os.environ["HALOVAE_GRAPHS"] = "0"


SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests and cases that slow.txt lists as slow."""
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        if listed & {item.nodeid, item.nodeid.partition("[")[0]}:
            item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):
        return
    # Cases may depend on the machine and on diffusers' version; tests do not.
    tests = {item.nodeid.partition("[")[0] for item in items}
    files = {name.partition("::")[0] for name in tests}
    named = {name.partition("[")[0] for name in listed}
    if gone := sorted(name for name in named - tests if name.partition("::")[0] in files):
        raise pytest.UsageError(f"tests/slow.txt lists what is no test: {', '.join(gone)}")


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Have compiled kernels in the cache folder, so that no test meets a process that is still at it."""
    native.ready(torch.device("cpu"), wait=True)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2)` is a group of two, kept for later tests until something fails on a rank."""
    groups: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in groups or not groups[size].alive:
            groups[size] = Ranks(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models("flux")` is a folder with that tiny pipeline, made once."""
    home = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (home / name).exists():
            done = CliRunner().invoke(app, ["make-model", name, "--size", "tiny", "-o", str(home / name)])
            assert done.exit_code == 0, done.output
        return home / name

    return of


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
