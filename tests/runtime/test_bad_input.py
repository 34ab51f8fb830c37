"""Arguments that cannot be served: refused on every rank, before any work, with what would be accepted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import latents, reference, vae
from torch import Tensor

import halovae
from halovae import Grid
from halovae.distributed.ranks import Ranks


@pytest.fixture
def decoder() -> halovae.VAE:
    return halovae.load(vae("wan2.1"))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(16, 2, 4, 4), ValueError, r"4 dims; expected 5: \[B, 16, T, H, W\] for wan2.1"),
        (torch.zeros(1, 48, 2, 4, 4), ValueError, r"48 channels; expected \[B, 16, T, H, W\]"),
        (torch.zeros(1, 16, 0, 4, 4), ValueError, "empty"),
        (torch.zeros(1, 16, 1, 4, 4, dtype=torch.int64), TypeError, "int64; expected a floating dtype"),
    ],
)
def test_latents_of_the_wrong_kind(decoder: halovae.VAE, bad: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decoder.decode(bad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk": 1}, TypeError, "unknown option chunk; expected mode, grid"),
        ({"mode": "fast"}, ValueError, "auto, single, parallel"),
        ({"memory_budget": 0}, ValueError, "expected a number of bytes > 0"),
        ({"gather": "rank1"}, ValueError, "rank0, all, none"),
        ({"dtype": torch.int32}, TypeError, "floating dtype or torch.uint8"),
        ({"grid": Grid(rows=2)}, ValueError, "needs 2 ranks, but the world has 1"),
    ],
)
def test_arguments_out_of_range(
    decoder: halovae.VAE, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        decoder.decode(latents("wan2.1"), **options)


def test_arguments_are_refused_by_the_call_and_not_by_the_first_frame(decoder: halovae.VAE) -> None:
    with pytest.raises(ValueError, match="gather"):
        decoder.stream(latents("wan2.1"), gather="rank1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 2 ranks"):
        decoder.stream(latents("wan2.1"), grid=Grid(rows=2))


def test_nan_and_inf_warn_with_their_count_and_the_decode_goes_on(decoder: halovae.VAE) -> None:
    z = latents("wan2.1")
    z[0, 0, 2, 0, 0], z[0, 3, 2, 1, 1] = torch.nan, torch.inf
    with pytest.warns(RuntimeWarning, match="2 NaN or infinite values among"):
        frames = decoder.decode(z)
    assert frames is not None
    # The last latent frame is broken; time is causal, so the first two are as they should be.
    clean = reference("wan2.1", z[:, :, :2])
    assert (frames[:, :, :5] - clean).abs().max() <= 1e-4
    assert frames[:, :, 5:].isnan().any()


def message_of(z: Tensor, **options: Any) -> str:
    """The error of a decode on this rank."""
    try:
        halovae.load(vae("wan2.1")).decode(z, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def too_many_ranks(z: Tensor) -> str:
    return message_of(z, grid=Grid(rows=4))


def test_more_ranks_than_rows_is_refused_by_all(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(4).run(too_many_ranks, latents("wan2.1", height=3)):
        assert message.startswith("ValueError: grid 4x1 puts 4 ranks along rows, but there are only 3 latent rows")


def one_bad_rank(z: Tensor) -> str:
    import torch.distributed as dist

    from halovae.distributed.transport import join_world

    join_world(torch.device("cpu"))
    return message_of(z[:, :5] if dist.get_rank() == 1 else z)


def test_one_ranks_bad_latents_are_an_error_on_all(ranks: Callable[[int], Ranks]) -> None:
    good, bad = ranks(2).run(one_bad_rank, latents("wan2.1"))
    assert "rank 1: ValueError" in good
    assert "5 channels" in good
    assert bad.startswith("ValueError: latents of shape")


def different_requests(z: Tensor) -> str:
    import torch.distributed as dist

    from halovae.distributed.transport import join_world

    join_world(torch.device("cpu"))
    return message_of(z, memory_budget=10**9 + dist.get_rank())


def test_ranks_that_ask_for_different_decodes_are_told_so(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(different_requests, latents("wan2.1")):
        assert "all ranks must ask for the same, but they differ" in message
        assert "memory_budget=1000000001" in message


def test_ranks_are_still_usable_after_a_refusal(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(message_of, latents("wan2.1")) == ["none", "none"]
