"""Ranks for tests: real gloo processes, started once per module and shared by its tests."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from halovae.bench.ranks import Ranks

# Plans by figures that do not change, and no measurement in each group of ranks.
os.environ["HALOVAE_CALIBRATION"] = "cpu-epyc-2-cores"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2)` is a group of two, kept for the module's later tests."""
    groups: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in groups:
            groups[size] = Ranks(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()


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
