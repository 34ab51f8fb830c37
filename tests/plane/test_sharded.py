"""`halovae.shard`, `parallelize` and `load` for any autoencoder, on real gloo ranks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import halovae
from halovae.distributed.mesh import Mesh
from halovae.distributed.ranks import Ranks
from halovae.distributed.simulated import on_threads
from halovae.errors import RankError
from halovae.grid import Grid
from halovae.models import zoo
from halovae.plane import keys

Group = Callable[[int], Ranks]
ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
KL = ENTRIES["AutoencoderKL"]


class Small(nn.Module):
    """A convolution, a norm over the plane, and an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None, times: int = 2) -> Tensor:
        y = self.norm(self.conv(x))
        y = y if shift is None else y + shift
        return nn.functional.interpolate(y, scale_factor=times)


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().double().eval().requires_grad_(False)


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def decoded(name: str, call: str, grid: Grid | None, gather: str) -> tuple[float, list[int] | None, Any]:
    """Return the error of an entry's call on this rank, the result's shape, and the report."""
    entry = ENTRIES[name]
    module, plain = zoo.build(entry, torch.float64), zoo.build(entry, torch.float64)
    shape = entry.latents if call == "decode" else entry.pictures
    assert shape is not None
    x = picture(*shape)
    sharded: Any = halovae.load(module)
    with torch.no_grad():
        expected = getattr(zoo, call)(plain, x)
    found = getattr(sharded, call)(x, grid=grid, gather=gather)
    if found is None:
        return 0.0, None, None
    if gather == "none":
        return 0.0, list(found.shape), sharded.report
    return (found - expected).abs().max().item(), list(found.shape), sharded.report


@pytest.mark.parametrize("call", ["decode", "encode"])
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLHunyuanVideo15", "AutoencoderTiny"])
def test_two_ranks_give_one_process_result(ranks: Group, name: str, call: str) -> None:
    for error, shape, _ in ranks(2).run(decoded, name, call, None, "all"):
        assert shape is not None
        assert error < 1e-12


def test_a_result_goes_where_it_is_wanted(ranks: Group) -> None:
    (error, whole, report), (_, nothing, _) = ranks(2).run(decoded, KL.name, "decode", Grid(cols=2), "rank0")
    assert error < 1e-12
    assert nothing is None
    assert whole is not None
    assert report.messages > 0
    assert not report.eager
    assert not report.fallbacks
    shapes = [shape for _, shape, _ in ranks(2).run(decoded, KL.name, "decode", Grid(cols=2), "none")]
    assert [shape[-1] for shape in shapes if shape] == [16, 12]
    assert all(shape[:-1] == whole[:-1] for shape in shapes if shape)


def shared_batch() -> float:
    module = small()
    x = picture(3, 3, 5, 4)
    found = halovae.shard(module)(x, grid=Grid(batch=2))
    assert found is not None
    return (found - module(x)).abs().max().item()


def test_ranks_share_the_items_of_a_batch(ranks: Group) -> None:
    assert max(ranks(2).run(shared_batch)) < 1e-12


def through_a_pipeline_call() -> list[float]:
    """Call a VAE as pipelines do: by name, as tuple, with a generator; then without halovae again."""
    plain, vae = zoo.build(KL, torch.float64), zoo.build(KL, torch.float64)
    vae_: Any = halovae.parallelize(vae)
    x = picture(*KL.latents or ())
    image = picture(*KL.pictures or ())
    p: Any = plain
    errors = []
    with torch.no_grad():
        errors.append(vae_.decode(x).sample - p.decode(x).sample)
        errors.append(vae_.decode(x, return_dict=False, generator=None)[0] - p.decode(x).sample)
        with torch.inference_mode():
            errors.append(vae_.decode(x).sample - p.decode(x).sample)
        errors.append(vae_.encode(image).latent_dist.mode() - p.encode(image).latent_dist.mode())
        drawn = [one.encode(image).latent_dist.sample(torch.Generator().manual_seed(2)) for one in (vae_, p)]
        errors.append(drawn[0] - drawn[1])
        vae_.enable_tiling()
        with pytest.warns(UserWarning, match="tiling"):
            errors.append(vae_.decode(x).sample - p.decode(x).sample)
        vae_.disable_tiling()
        halovae.restore(vae)
        assert "decode" not in vars(vae)
    return [one.abs().max().item() for one in errors]


def test_a_parallelized_vae_keeps_its_calls(ranks: Group) -> None:
    for errors in ranks(2).run(through_a_pipeline_call):
        assert max(errors) < 1e-12


def other_weights(rank_seed: bool) -> None:
    import torch.distributed as dist

    from halovae.distributed.transport import join_world

    join_world(torch.device("cpu"))
    module = small(dist.get_rank() if rank_seed else 0)
    halovae.shard(module)(picture(1, 3, 6, 4))


def test_ranks_with_other_weights_raise_errors(ranks: Group) -> None:
    ranks(2).run(other_weights, False)
    with pytest.raises(RankError, match="all ranks must ask for the same"):
        Ranks(2).run(other_weights, True)


def weights_digested() -> list[int]:
    """Return how often the weights had been digested after each of some calls."""
    import torch.distributed as dist

    from halovae.distributed.transport import join_world

    join_world(torch.device("cpu"))
    counts, module = [], small()
    with patch.object(keys, "weights_digest", wraps=keys.weights_digest) as digest:
        shard = halovae.shard(module)
        for rows, grid in ((6, Grid(rows=2)), (8, Grid(rows=2)), (6, Grid(cols=2))):
            shard(picture(1, 3, rows, 4), grid=grid)
            counts.append(digest.call_count)
        module.conv.weight.mul_(2)
        shard(picture(1, 3, 6, 4), grid=Grid(rows=2))
        counts.append(digest.call_count)
        for _ in range(2):  # the new weights may get the addresses of the old ones
            module.load_state_dict({name: one.clone() for name, one in module.state_dict().items()}, assign=True)
            shard(picture(1, 3, 6, 4), grid=Grid(rows=2))
            counts.append(digest.call_count)
        module.conv.weight.mul_(dist.get_rank())
        with pytest.raises(RuntimeError, match="weights"):
            shard(picture(1, 3, 6, 4), grid=Grid(rows=2))
    return counts


def test_weights_are_digested_once_until_they_change(ranks: Group) -> None:
    assert ranks(2).run(weights_digested) == [[1, 1, 1, 2, 3, 4]] * 2


def digested_in_two_worlds() -> tuple[str, str]:
    from halovae.distributed.transport import join_world

    join_world(torch.device("cpu"))
    digest = keys.WeightsDigest([small()])
    with patch.object(keys, "world_size", lambda: 1):
        single = digest()
    return single, digest()


def test_weights_are_digested_again_in_another_world(ranks: Group) -> None:
    for single, together in ranks(2).run(digested_in_two_worlds):
        assert not single
        assert together


def refused(what: str) -> str:
    module = small()
    shard, x = halovae.shard(module), picture(1, 3, 6, 4)
    try:
        if what == "rows":
            shard(picture(1, 3, 1, 4), grid=Grid(rows=2))
        elif what == "world":
            shard(x, grid=Grid(rows=3))
        elif what == "gather":
            shard(x, gather="some")  # type: ignore[arg-type]
        elif what == "integers":
            shard(torch.zeros(1, 3, 6, 4, dtype=torch.int64))
        elif what == "gradients":
            shard(x.requires_grad_())
        elif what == "result":
            halovae.shard(lambda z: module(z).mean((2, 3)), module)(x)
        elif what == "plane":
            halovae.load(zoo.build(KL)).decode(torch.zeros(1, 4, 8))
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "2 ranks along rows, but there are only 1"),
        ("world", "grid 3x1 needs 3 ranks, but the world has 2"),
        ("gather", "gather='some': expected one of rank0, all, none"),
        ("integers", r"expected a floating tensor \[B, ..., H, W\], got torch.int64"),
        ("gradients", "inference only"),
        ("result", r"made a result of shape \[1, 4\]"),
        ("plane", "without a plane"),
    ],
)
def test_bad_input_is_refused_by_all_ranks(ranks: Group, what: str, message: str) -> None:
    for error in ranks(2).run(refused, what):
        assert re.search(message, error), error


def test_a_function_reads_values_of_its_input_and_runs_eagerly() -> None:
    module = small()
    shard = halovae.shard(lambda z: module(z) * float(z.mean() > 0), module)
    x = picture(1, 3, 6, 4)
    found = shard(x)
    assert found is not None
    assert torch.equal(found, module(x) * float(x.mean() > 0))
    assert shard.report is not None
    assert "test_sharded.py" in shard.report.eager  # the place is named


def test_what_an_object_on_a_module_kept_from_a_failed_recording_is_forgotten() -> None:
    """As diffusers' schedulers keep tensors that they moved to the device they are called for."""

    class Scheduler:
        scale = torch.ones(())

        def at(self, x: Tensor) -> Tensor:
            self.scale = self.scale * x.new_ones(()) + x.mean() * 0
            return self.scale

    class Scaled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.scheduler = Scheduler()

        def forward(self, x: Tensor, shift: Tensor | None = None, times: int = 2) -> Tensor:
            scaled = super().forward(x) * self.scheduler.at(x)
            return scaled * float(x.mean() > -9)  # reads a value, so it is not recorded

    module = Scaled().double().requires_grad_(False)
    x = picture(1, 3, 6, 4)
    shard = halovae.shard(module)
    found = shard(x)
    assert shard.report is not None
    assert shard.report.eager
    assert found is not None
    assert torch.equal(found, module(x))


def test_a_result_that_is_not_held_by_rows_and_cols_is_gathered() -> None:
    """MiniMax's decoder joins pieces of a clip last: each rank holds several ranges of rows."""
    entry = ENTRIES["AutoencoderKLMiniMaxH3"]
    assert entry.latents is not None
    module, x = zoo.build(entry, torch.float64), picture(*entry.latents)

    def rank(mesh: Mesh) -> Tensor | None:
        own = copy.deepcopy(module)
        with torch.no_grad():
            return halovae.shard(lambda z: zoo.decode(own, z), own)(x, mesh=mesh)

    with torch.no_grad():
        expected = zoo.decode(module, x)
    for found in on_threads(Grid(rows=2), torch.device("cpu"), rank):
        assert found is not None
        assert (found - expected).abs().max() <= 1e-6


def test_programs_are_kept_and_follow_the_weights() -> None:
    module = small()
    shard = halovae.shard(module)
    x, shift = picture(1, 3, 6, 4), picture(1, 4, 1, 1)
    for options in ({}, {"times": 3}):
        for given in ((), (shift,), (shift + 1,)):
            found = shard(x, *given, options=options)
            assert found is not None
            torch.testing.assert_close(found, module(x, *given, **options), rtol=0, atol=1e-12)
    assert len(shard._programs) == 4
    module.conv.weight.mul_(2)
    found = shard(x)
    assert found is not None
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)
    assert len(shard._programs) == 4
    module.conv.weight = nn.Parameter(module.conv.weight * 2, requires_grad=False)
    found = shard(x)
    assert found is not None
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)
    assert len(shard._programs) == 5


def test_what_is_no_module_names_its_modules() -> None:
    with pytest.raises(ValueError, match="modules: name the modules"):
        halovae.shard(lambda z: z)
    with pytest.raises(TypeError, match="expected a module or a function, got int"):
        halovae.shard(3)  # type: ignore[arg-type]


def test_a_folder_of_any_class_is_loaded(tmp_path: Any) -> None:
    vae: Any = zoo.build(ENTRIES["AutoencoderKLMochi"])
    vae.save_pretrained(tmp_path)
    x = torch.randn(ENTRIES["AutoencoderKLMochi"].latents or ())
    found = halovae.load(tmp_path).decode(x, gather="all")
    with torch.no_grad():
        torch.testing.assert_close(found, vae.decode(x).sample, rtol=0, atol=1e-5)


class Holder(nn.Module):
    """Depends on all kinds of state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Identity()
        self.inner.scale = 1.0  # type: ignore[assignment]
        self.register_buffer("b", torch.zeros(1, dtype=torch.float64))
        self.b: Tensor
        self.table = torch.ones(1, dtype=torch.float64)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor, opt: Any = None) -> Tensor:
        if "ramp" not in self.cache:
            self.cache["ramp"] = torch.arange(x.shape[-1], dtype=x.dtype)
        y = x * self.inner.scale + self.b + self.table + self.cache["ramp"]  # type: ignore[operator]
        return self.inner(y) * (1.0 if opt is None else opt[0])


def change(module: Holder, what: str) -> None:
    if what == "flag":
        module.inner.scale = 2.0  # type: ignore[assignment]
    elif what == "buffer":
        module.b = torch.ones(1, dtype=torch.float64)
    elif what == "in place":
        module.table.add_(1)
    elif what == "attribute":
        module.table = torch.zeros(1, dtype=torch.float64)
    elif what == "submodule":
        module.inner = nn.ReLU()
        module.inner.scale = 1.0  # type: ignore[assignment]
    elif what == "hook":
        module.inner.register_forward_hook(lambda _, __, out: out * 3)


@pytest.mark.parametrize("what", ["flag", "buffer", "in place", "attribute", "submodule", "hook"])
def test_what_a_module_is_changed_to_is_recorded_again(what: str) -> None:
    module = Holder().eval()
    shard, x = halovae.shard(module), picture(1, 3, 6, 4)
    for _ in range(2):
        found = shard(x)
        assert found is not None
        plain = Holder().eval()
        plain.load_state_dict(module.state_dict())
        plain.table, plain.inner = module.table, module.inner
        torch.testing.assert_close(found, plain(x), rtol=0, atol=1e-12)
        change(module, what)
    assert not module.cache  # nothing of a recording stays
    assert type(module.b) is Tensor


def test_options_are_compared_by_value() -> None:
    module = Holder().eval()
    shard, x = halovae.shard(module), picture(1, 3, 6, 4)
    one, two = (shard(x, options={"opt": [value]}) for value in (1.0, 2.0))
    assert one is not None
    assert two is not None
    assert torch.equal(one * 2, two)


def test_a_graph_depends_on_autocast() -> None:
    module = small().float()
    shard, x = halovae.shard(module), torch.randn(1, 3, 6, 4)
    plain = shard(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, expected = shard(x), module(x)
    assert plain is not None
    assert cast is not None
    assert plain.dtype == torch.float32
    assert cast.dtype == expected.dtype


def test_weights_that_hooks_cast_are_decoded_eagerly() -> None:
    vae: Any = zoo.build(KL)
    x = torch.randn(KL.latents or ())
    vae.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with torch.no_grad():
        expected = vae.decode(x).sample
    vae = halovae.parallelize(vae)
    for _ in range(2):
        torch.testing.assert_close(vae.decode(x).sample, expected, rtol=0, atol=1e-5)
    halovae.restore(vae)
    with torch.no_grad():
        assert torch.equal(vae.decode(x).sample, expected)


def test_a_copy_decodes_with_its_own_weights() -> None:
    import copy

    vae: Any = halovae.parallelize(zoo.build(KL))
    x = torch.randn(KL.latents or ())
    other = copy.deepcopy(vae)
    for weight in other.parameters():
        weight.zero_()
    assert vae.decode(x).sample.abs().max() > 0
    assert other.decode(x).sample.abs().max() == 0


def test_a_function_that_is_not_recorded_lets_go_of_what_it_computed() -> None:
    import gc
    import weakref

    module = small()
    shard = halovae.shard(lambda z: module(z) * float(z.mean() > 0), module)
    found = shard(picture(1, 3, 6, 4))
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None


def test_extras_follow_the_items_of_a_batch(ranks: Group) -> None:
    assert max(ranks(2).run(batch_with_extras)) < 1e-12


def batch_with_extras() -> float:
    module = small()
    x, shift = picture(2, 3, 5, 4), picture(2, 4, 1, 1)
    found = halovae.shard(module)(x, shift, grid=Grid(batch=2))
    assert found is not None
    return (found - module(x, shift)).abs().max().item()
