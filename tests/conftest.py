"""Ranks for tests: real gloo processes, started once per module and shared by its tests."""

import os
from collections.abc import Callable, Iterator

import pytest

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
