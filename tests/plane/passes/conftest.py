"""What tests of passes share."""

import pytest
import torch

from halovae.kernels import winograd


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd for any map in fp32, by eager kernels."""
    monkeypatch.setattr(winograd, "is_profitable", lambda scheme, weight, *_: weight.dtype == torch.float32)
