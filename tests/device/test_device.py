"""Devices: the CPU itself, and Ascend's rules against a stand-in for torch_npu."""

import ast
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from samples import latents, reference, vae

import halovae
from halovae import Grid
from halovae.device import metal
from halovae.device.kinds import Device, Stopwatch
from halovae.device.memory import MemoryMeter
from halovae.kernels import halves
from halovae.kernels.pool import BufferPool
from halovae.runtime.simulate import simulate

CPU = Device(torch.device("cpu"))


def test_the_cpu() -> None:
    assert (CPU.kind, CPU.backend, CPU.count) == ("cpu", "gloo", len(os.sched_getaffinity(0)))
    free, total = CPU.memory()
    assert 0 < free < total
    assert CPU.layout(5) == torch.channels_last_3d
    assert CPU.layout(1) == torch.contiguous_format
    assert CPU.convolution_cells is None
    assert CPU.describe()["torch"] == torch.__version__


def test_a_missing_device_is_refused_with_a_list_of_those_present() -> None:
    with pytest.raises(ValueError, match=r"device 'npu' is not here; there is .*cpu"):
        Device.default("npu")


def test_on_cuda_algorithms_are_pinned_while_decoding_and_only_then() -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    cuda = Device(torch.device("cuda"))
    for tf32 in (True, False):
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
            with cuda.repeatable():
                assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, tf32)
            with cuda.choosing():  # while warming up, deterministic algorithms are measured
                assert cuda.is_choosing
                with cuda.repeatable():
                    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, True, tf32)
            assert not cuda.is_choosing
            with cuda.repeatable():
                assert not cudnn.benchmark
            assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch(CPU)
    assert watch.seconds() == 0
    with watch.running():
        pass
    first = watch.seconds()
    with watch.running():
        pass
    assert watch.seconds() > first > 0


# A module that has only the names of torch_npu that halovae calls (scripts/check_torch_npu.py looks them up in its
# wheel), registered as torch_npu registers its own. Memory figures are invented.
STAND_IN = """
import os, sys, types
import torch, torch.distributed as dist

calls = []
npu = types.ModuleType("torch.npu")
npu.is_available = lambda: True
npu.device_count = lambda: 4
npu.set_device = lambda device: calls.append(("set_device", str(device)))
npu.synchronize = lambda device=None: calls.append(("synchronize", str(device)))
npu.mem_get_info = lambda device=None: (60 << 30, 64 << 30)
npu.memory_reserved = lambda device=None: 3 << 30
npu.max_memory_reserved = lambda device=None: 10 << 30
npu.max_memory_allocated = lambda device=None: 8 << 30
npu.reset_peak_memory_stats = lambda device=None: calls.append(("reset", str(device)))
npu.get_device_name = lambda device=None: "Ascend910B3"
npu.utils = types.SimpleNamespace(get_cann_version=lambda: "8.5.0")
class Event:
    clock = 0
    def __init__(self, enable_timing): assert enable_timing
    def record(self): Event.clock += 250; self.at = Event.clock
    def elapsed_time(self, later): return later.at - self.at
npu.Event = Event
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
dist.Backend.register_backend("hccl", lambda *arguments: None, devices=["npu"])
torch_npu = sys.modules["torch_npu"] = types.ModuleType("torch_npu")
torch_npu.__version__ = "2.13.0"
"""


def with_stand_in(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_local_rank_gets_its_npu_if_torch_npu_is_installed() -> None:
    script = """
        from halovae.device.kinds import Device
        device = Device.default()
        device.enter()
        print(device.torch_device, device.backend, device.count, calls, Device.default("cpu").torch_device)
        """
    assert with_stand_in(script, LOCAL_RANK="2") == "npu:2 hccl 4 [('set_device', 'npu:2')] cpu"


def test_more_ranks_than_devices_are_refused() -> None:
    script = """
        from halovae.cli.measuring import check_ranks
        print(check_ranks("--num-gpus", 4, None).kind)
        try:
            check_ranks("--num-gpus", 5, "npu")
        except ValueError as error:
            print(error)
        """
    assert with_stand_in(script).splitlines() == ["npu", "--num-gpus 5: there are 4 npu devices here"]


def test_the_npus_memory_and_time_come_from_torch_npu() -> None:
    script = """
        from halovae.device.kinds import Device, Stopwatch
        from halovae.device.memory import MemoryMeter
        device = Device.default()
        meter, watch = MemoryMeter(device), Stopwatch(device)
        with meter.counting(), watch.running():
            pass
        memory = meter.read()
        print([getattr(memory, name) >> 30 for name in
              ("peak_reserved", "peak_allocated", "pool_overhead", "remaining", "resting", "above_resting")])
        print(watch.seconds(), calls)
        import pickle
        with watch.running():
            pass
        print(pickle.loads(pickle.dumps(watch)).seconds())  # as reports go to other processes
        """
    figures, times, sent = with_stand_in(script).splitlines()
    assert figures == "[10, 8, 2, 53, 3, 7]"
    assert times == "0.25 [('reset', 'npu:0'), ('synchronize', 'npu:0')]"
    assert sent == "0.5"


def test_the_npus_rules() -> None:
    script = """
        from halovae.device.kinds import Device
        device = Device.default()
        print(device.layout(5), device.layout(4), device.convolution_cells)
        print(device.describe())
        """
    rules, described = with_stand_in(script).splitlines()
    assert rules == "torch.contiguous_format torch.contiguous_format 230400"
    assert "'device': 'Ascend910B3 (npu)'" in described
    assert "'CANN': '8.5.0'" in described


@pytest.mark.parametrize(("family", "grid"), [("wan2.1", "1x1"), ("wan2.2-5b", "2x2")])
def test_decodes_by_the_npus_rules_equal_diffusers(family: str, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous feature maps, and convolutions split by rows, here on the CPU."""
    largest = 300
    monkeypatch.setattr(Device, "layout", lambda self, ndim=5: torch.contiguous_format)
    monkeypatch.setattr(Device, "convolution_cells", property(lambda self: largest))
    made: list[int] = []
    original = halves._convolution

    def recorded(*given: Any) -> Any:
        result = original(*given)
        made.append(result.shape[-2] * result.shape[-1])
        return result

    monkeypatch.setattr(halves, "_convolution", recorded)
    z = latents(family)
    frames = simulate(halovae.load(vae(family)), z, Grid.parse(grid)).frames
    assert 0 < max(made) <= largest
    assert BufferPool(torch.device("meta")).empty((1, 8, 2, 3, 4), torch.float32).is_contiguous()
    monkeypatch.undo()
    assert (frames - reference(family, z)).abs().max() <= 1e-4


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_too_large_for_a_device_are_split_by_rows(
    kernel: int, stride: int, padding: int, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(4, 2, kernel, kernel, dtype=torch.float64)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    given = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1
    expected = torch.ops.aten.convolution.default(x, weight, None, *given)
    monkeypatch.setattr(Device, "convolution_cells", property(lambda self: 2 * expected.shape[-1]))
    torch.testing.assert_close(halves.convolution(x, weight, None, *given), expected)
    flat = [stride], [padding], [dilation], False, [0], 1
    expected = torch.ops.aten.convolution.default(x[..., 0], weight[..., 0], None, *flat)
    torch.testing.assert_close(halves.convolution(x[..., 0], weight[..., 0], None, *flat), expected)


def test_what_is_sent_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    from halovae.distributed.simulated import SimulatedTransport

    sent: list[bool] = []
    original = SimulatedTransport.start

    def recorded(self: Any, scope: Any, sends: Any, receives: Any) -> Any:
        sent.extend(tensor.is_contiguous() for _, tensor in [*sends, *receives])
        return original(self, scope, sends, receives)

    monkeypatch.setattr(SimulatedTransport, "start", recorded)
    simulate(halovae.load(vae("wan2.1")), latents("wan2.1"), Grid(rows=2, cols=2))
    assert sent
    assert all(sent)


def names_called() -> set[str]:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "check_torch_npu.py"))
    return script["names_called"]()


@pytest.mark.parametrize("module", [torch.cuda, torch.xpu, metal], ids=lambda one: one.__name__)
def test_every_name_that_is_called_on_an_accelerators_module_exists(module: ModuleType) -> None:
    of_npus_only = {"utils", "get_cann_version"}
    # Apple's GPUs have no streams, and their memory is counted otherwise.
    streams = {"Stream", "stream", "current_stream", "set_stream", "device"}
    without = {"max_memory_allocated", *streams} if module is metal else set()
    called = names_called() - of_npus_only - without
    assert {"mem_get_info", "memory_reserved", "memory_allocated", "Event"} <= called
    assert [name for name in sorted(called) if not hasattr(module, name)] == []


def test_every_name_of_torch_mps_that_is_called_exists() -> None:
    found = {
        node.attr
        for node in ast.walk(ast.parse(Path(metal.__file__).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.mps"
    }
    assert len(found) == 6
    assert [name for name in sorted(found) if not hasattr(torch.mps, name)] == []


def test_one_apple_gpu_has_memory_figures_and_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [3 << 30]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 << 30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: held[0])
    device = Device.default("mps")
    assert (str(device.torch_device), device.count) == ("mps:0", 1)
    assert device.memory() == (45 << 30, 48 << 30)
    assert device.layout(5) == device.layout(4) == torch.contiguous_format
    assert device.convolution_cells is None
    assert device.describe()["device"] == "Apple GPU (mps)"
    meter = MemoryMeter(device)
    with meter.counting():
        kept = torch.ones(1 << 10)
    held[0] = 5 << 30
    memory = meter.read()
    assert (memory.peak_reserved, memory.peak_allocated, memory.resting) == (5 << 30, kept.nbytes, 3 << 30)
    with pytest.raises(ValueError, match="device 'mps' has no collectives: expected one rank, or device 'cpu'"):
        _ = device.backend


def test_the_script_finds_names_that_a_wheel_lacks(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "torch_npu-0-none.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("torch_npu/npu/__init__.py", "def is_available(): ...\ndef device_count(): ...\n")
        files.writestr("torch_npu/npu/utils.py", "def synchronize(): ...\n")
    script = Path(__file__).parents[2] / "scripts" / "check_torch_npu.py"
    done = subprocess.run([sys.executable, str(script), str(wheel)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "torch.npu.is_available: torch_npu/npu/__init__.py" in done.stdout
    assert "torch.npu.mem_get_info: MISSING" in done.stdout
