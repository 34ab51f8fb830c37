"""Predicted costs of recorded graphs, against real decodes."""

from typing import Any

import pytest
import torch
from samples import FAMILIES, latents, vae
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import halovae
from halovae import Grid, Mesh
from halovae.device.memory import LiveBytes
from halovae.models import zoo
from halovae.plane import context, norms
from halovae.plane.moments import moments
from halovae.planning.cost import Cost, described
from halovae.planning.graphs import traced


def cost_of(family: str, shape: tuple[int, ...], grid: Grid, dtype: torch.dtype = torch.float32) -> Cost:
    return traced(lambda z: zoo.decode(vae(family), z), vae(family), shape, dtype, grid, kind="cpu").cost


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_flops_are_those_of_a_real_decode(family: str, frames: int) -> None:
    z = latents(family, frames=frames)
    decoder = halovae.load(vae(family))
    decoder.decode(z)  # records the graph
    with FlopCounterMode(display=False) as counter:
        decoder.decode(z)
    cost = cost_of(family, tuple(z.shape), Grid())
    # The counter does not count the attention that runs on the CPU.
    attention = cost.kinds()["scaled_dot_product_attention"].flops
    assert cost.flops - attention == counter.get_total_flops()
    assert 0 < attention < 0.01 * cost.flops


def test_weights_are_counted_in_bytes() -> None:
    used = [weight for name, weight in vae("wan2.1").named_parameters() if not name.startswith(("encoder", "quant_"))]
    cost = cost_of("wan2.1", (1, 16, 3, 6, 6), Grid())
    assert cost.weights == 4 * sum(weight.numel() for weight in used)


def test_the_peak_falls_with_the_ranks() -> None:
    single, shared = (cost_of("wan2.1", (1, 16, 3, 32, 32), Grid(rows=rows)) for rows in (1, 4))
    assert shared.peak <= 0.35 * single.peak
    assert shared.weights == single.weights


def test_live_bytes_of_a_stream_do_not_grow_with_its_length() -> None:
    decoder, peaks = halovae.load(vae("wan2.1")), []
    for frames in (5, 9, 27):
        z = latents("wan2.1", frames=frames, height=4, width=4)
        decoder.decode(z)  # records the graph
        with LiveBytes() as live:
            for _ in decoder.stream(z, dtype=torch.uint8):
                pass
        peaks.append(live.peak - z.nbytes)  # without the copy of the latents that the module may write to
    assert max(peaks) - min(peaks) <= 0.01 * min(peaks)


class Described(TorchDispatchMode):
    """Records the kinds of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind, work = described(func, args, kwargs or {}, result)
        assert work.calls == 1
        self.kinds.append(kind)
        return result


def test_our_own_operators_have_a_cost() -> None:
    x = torch.randn(1, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), context.on(Mesh(Grid(), torch.device("cpu"))), Described() as seen:
        moments(x, 4, torch.float32)
        norms.write(x, None, None, None, (4, 1e-5, "plane", ()), True, torch.empty_like(x))
    assert sum(kind.startswith("halovae") for kind in seen.kinds) == 3
