"""Models of the tests of datasets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halovae.cluster.encode import EncodeRows
from halovae.cluster.facts import Facts


@pytest.fixture(scope="session")
def wan(models: Callable[[str], Path]) -> Path:
    return models("wan2.1") / "vae"


@pytest.fixture(scope="session")
def facts(wan: Path) -> Facts:
    return Facts.read(wan)


@pytest.fixture(scope="session")
def encoder(wan: Path) -> EncodeRows:
    return EncodeRows(4, model=str(wan))
