"""All families on a device that is not there: it notices tensors on the host, and whatever waits for the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch
from device import on_stand_in, stand_in

from halovae.device import captures
from halovae.models import zoo
from halovae.models.zoo import Direction

pytest.importorskip("diffusers")
if not hasattr(torch._C, "_acc") or not hasattr(torch._C._acc, "create_empty_tensor"):
    pytest.skip("this torch has no backends in Python", allow_module_level=True)

Run = Callable[..., Any]
CALLS: list[tuple[str, Direction]] = [
    (entry.name, direction)
    for entry in zoo.ENTRIES
    for direction in zoo.CALLS
    if entry.shape(direction) is not None
]  # fmt: skip
FAST = {"AutoencoderTiny", "AutoencoderKLFlux2", "AutoencoderKLQwenImage21"}
NOT_RECORDED = ("ConsistencyDecoderVAE", "decode")  # its scheduler reads values in each step
CHECK = "plane_call.py"  # before a call, its input is searched for NaN: one wait


@pytest.fixture(scope="module")
def on() -> Iterator[Callable[[str], Run]]:
    """`on("npu")` runs functions in a process that has the device under this name."""
    processes: dict[str, ProcessPoolExecutor] = {}

    def of(kind: str) -> Run:
        def run(function: Callable[..., Any], *arguments: Any) -> Any:
            if kind not in processes:
                processes[kind] = ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), initializer=stand_in.install, initargs=(kind,)
                )
            try:
                return processes[kind].submit(function, *arguments).result()
            except BrokenProcessPool:
                del processes[kind]
                raise

        return run

    yield of
    for one in processes.values():
        one.shutdown()


def check(done: on_stand_in.Outcome, name: str, kind: str, is_recorded: bool = True) -> None:
    assert done.error <= on_stand_in.ENTRIES[name].bound
    assert done.devices == {kind}
    if is_recorded:
        assert done.eager == ""
        assert done.waits == []
        assert done.on_host == []


@pytest.mark.parametrize(
    ("name", "direction"), [pytest.param(*one, marks=() if one[0] in FAST else pytest.mark.slow) for one in CALLS]
)
def test_one_rank_equals_diffusers_and_never_waits_for_the_device(
    name: str, direction: Direction, on: Callable[[str], Run]
) -> None:
    done = on("standin")(on_stand_in.call, name, direction, "1x1")
    check(done, name, "standin", (name, direction) != NOT_RECORDED)


@pytest.mark.parametrize(("name", "direction"), CALLS)
def test_simulated_ranks_by_the_npus_rules_equal_diffusers(
    name: str, direction: Direction, on: Callable[[str], Run]
) -> None:
    done = on("npu")(on_stand_in.call, name, direction, "2x1")
    check(done, name, "npu", (name, direction) != NOT_RECORDED)


@pytest.mark.parametrize(
    ("name", "kind", "grid"),
    [
        ("AutoencoderKLFlux2", "standin", "1x1"), ("AutoencoderKLQwenImage21", "standin", "1x1"),
        ("AutoencoderKLFlux2", "npu", "2x1"),  # contiguous maps
    ],
)  # fmt: skip
def test_triton_kernels_are_called_with_tensors_of_the_device_only(
    name: str, kind: str, grid: str, on: Callable[[str], Run]
) -> None:
    pytest.importorskip("triton")
    check(on(kind)(on_stand_in.call, name, "decode", grid, True), name, kind)


@pytest.mark.parametrize("kind", ["standin", "npu"])
@pytest.mark.parametrize(("family", "dtype"), [("wan2.1", None), ("wan2.1", torch.uint8), ("qwen-image", None)])
def test_a_steady_chunk_of_a_clip_never_waits(
    family: str, dtype: torch.dtype | None, kind: str, on: Callable[[str], Run]
) -> None:
    """Only the call itself waits, once, to search the latents for NaN; and so does whoever reads the report."""
    waits, reading, done = on(kind)(on_stand_in.stream, family, dtype)
    assert waits == [[]] * 5  # of four chunks, and of the end
    assert len(reading) == 1
    assert "synchronize" in reading[0]
    assert len(done.waits) == 1
    assert CHECK in done.waits[0]
    assert (done.devices, done.on_host) == ({kind}, [])
    assert done.error <= (1 if dtype == torch.uint8 else 1e-4)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("AutoencoderKLFlux2", "decode"), ("AutoencoderKLFlux2", "encode"), ("AutoencoderKLQwenImage21", "decode"),
    ],
)  # fmt: skip
def test_captured_graphs_compute_the_values_of_each_call(
    name: str, direction: Direction, on: Callable[[str], Run]
) -> None:
    error, replays, count, eager = on("standin")(on_stand_in.captured, name, direction)
    assert eager == ""
    assert error <= on_stand_in.ENTRIES[name].bound
    assert replays >= 6 - captures.CALLS
    assert count >= 1


def test_a_steady_chunk_is_one_replay_after_warm_up_and_never_waits(on: Callable[[str], Run]) -> None:
    error, replays, waits = on("standin")(on_stand_in.captured_stream, "wan2.1")
    assert error <= 1
    assert replays == 5  # of six chunks: the last one's graph is not among those that warming up captures
    assert len(waits) == 1
    assert CHECK in waits[0]


def test_while_steps_are_counted_nothing_is_captured(on: Callable[[str], Run]) -> None:
    assert on("standin")(on_stand_in.captured, "AutoencoderTiny", "decode")[1:3] == (6 - captures.CALLS, 1)
    assert on("standin")(on_stand_in.captured, "AutoencoderTiny", "decode", True)[1:3] == (0, 0)


def test_within_a_memory_budget_nothing_is_captured(on: Callable[[str], Run]) -> None:
    error, replays, _ = on("standin")(on_stand_in.captured_stream, "wan2.1", 1 << 33)
    assert (error <= 1, replays) == (True, 0)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2-5b"])
def test_replaced_methods_run_on_the_device(family: str, on: Callable[[str], Run]) -> None:
    done = on("standin")(on_stand_in.parallelized, family)
    assert all(CHECK in one for one in done.waits)
    assert (done.devices, done.on_host) == ({"standin"}, [])
    assert done.error <= 1e-4


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderTiny"])
def test_the_peak_of_a_graph_is_what_the_devices_allocator_counts(name: str, on: Callable[[str], Run]) -> None:
    predicted, measured = on("standin")(on_stand_in.peaks, name)
    assert predicted == measured


def test_what_strips_leave_for_later_ones_waits_on_the_host_if_asked(on: Callable[[str], Run]) -> None:
    ways = [on("npu")(on_stand_in.in_strips, "AutoencoderKLWan (2.1)", host) for host in (False, True)]
    (left, planned, counted, error), (_, planned_lean, counted_lean, other_error) = ways
    assert max(error, other_error) < 1e-5
    assert planned - planned_lean == left > 0
    assert counted - counted_lean >= 0.9 * left
    assert counted <= planned
    assert counted_lean <= planned_lean


def test_what_a_module_makes_on_the_host_and_moves_is_on_the_device_in_its_graph(on: Callable[[str], Run]) -> None:
    error, eager = on("standin")(on_stand_in.tables)
    assert eager == ""
    assert error <= 1e-12


NOTICED = {  # how a module is wrong: part of the error, of a wait, and of an operator on the host
    "made on the host": ("at least two devices", "", "aten.ones"),
    "joined with the host's": ("on cpu and others on standin", "", "aten.ones"),
    "numpy": ("can't convert standin:0", "", ""),
    "item": ("", "_local_scalar_dense", ""),
    "bool": ("", "_local_scalar_dense", ""),
    "tolist": ("", "a copy to the host of [4]", "_to_copy"),
    "to the host and back": ("", "a copy from the host of [1, 3, 4, 4]", "aten.mul"),
    "indexed by a mask": ("", "index_put", ""),
    "uploaded": ("", "a copy from the host of [3]", ""),
    "compared": ("", "aten.equal", ""),
    "nothing": ("", "", ""),
}


@pytest.mark.parametrize("how", NOTICED)
def test_the_device_notices(how: str, on: Callable[[str], Run]) -> None:
    error, waits, on_host = on("standin")(on_stand_in.misused, how)
    for found, expected in zip((error, "\n".join(waits), "\n".join(on_host)), NOTICED[how], strict=True):
        assert bool(found) == bool(expected), found
        assert expected in found
    assert all("on_stand_in.py" in one for one in waits)  # the line is named


def test_code_of_the_host_cannot_read_the_devices_memory(on: Callable[[str], Run]) -> None:
    with pytest.raises(BrokenProcessPool):
        on("a")(on_stand_in.address)


@pytest.mark.parametrize("how", ["zeros", "reading"])
def test_a_mistake_in_a_graphs_operators_is_noticed(how: str, on: Callable[[str], Run]) -> None:
    found = on("standin")(on_stand_in.broken, how)
    if how == "zeros":
        assert "on cpu and others on standin" in found
    else:
        assert found.error <= 1e-12
        assert all("_local_scalar_dense" in one and "(reading)" in one for one in found.waits)
        assert found.waits
