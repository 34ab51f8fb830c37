"""Random networks are exact with all passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.passes.cases import GRIDS, check
from plane.test_trace import picture
from torch import Tensor, nn

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Random(nn.Module):
    """Convolutions, norms, sums, upsamplings and views in random order."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3 if step % 2 else 1, padding=step % 2) for step in steps)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        kept, larger = x, 0
        for step, conv, norm in zip(self.steps, self.convs, self.norms, strict=True):
            if step in (0, 1):
                x = conv(x)
            elif step in (2, 3):
                x = conv(F.silu(norm(x)))
            elif step == 4:
                x, kept = x + kept, x
            elif step == 5 and larger < 1:
                x = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
                kept, larger = x, larger + 1
            elif step == 6:
                x = x.transpose(-1, -2).transpose(-1, -2) / 1 + 0
            elif step == 7:
                x = F.silu(x) * x
            elif step == 8:
                kept = F.silu(kept)
            else:
                x = F.conv2d(F.pad(x, (1, 1, 1, 1)), x.new_ones(()).expand(4, 4, 3, 3) / 9)
        return x - kept


def drawn(data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
    grid = data.draw(st.sampled_from(GRIDS))
    size = data.draw(st.integers(6, 12)), data.draw(st.integers(6, 12))
    check(Random(steps).double(), picture(data.draw(st.integers(1, 2)), 4, *size), (grid,), atol=1e-11)


@QUICK
@given(data=st.data())
def test_any_network_is_exact(data: st.DataObject) -> None:
    drawn(data)


@pytest.mark.slow
@settings(QUICK, max_examples=400, derandomize=False, print_blob=True)
@given(data=st.data())
def test_many_networks_are_exact(data: st.DataObject) -> None:
    drawn(data)
