"""What listens on the network while ranks of this host work: loopback only, and nothing that unpickles.

`listening` is `ss -ltn`: it is compared before and during a two-rank run of each command.
"""

import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from samples import latents, vae
from serving.server import Server
from typer.testing import CliRunner

from halovae import Grid, Mesh
from halovae.cli.main import app
from halovae.device.kinds import Device
from halovae.distributed.launch import launch
from halovae.distributed.ranks import Ranks
from halovae.io import latents as latents_file
from halovae.pipelines import tiny
from halovae.runtime.vae import VAE
from halovae.serving.broadcast import RankZeroBroadcast

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="reads Linux's tables of sockets")

_LOOK_S = 0.1  # a look takes 15 ms of a core
_LONG_S = 60


def listening() -> dict[tuple[str, int], int | None]:
    """Address and port of each listening TCP socket of this machine, and the process that holds it."""
    sockets = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return {(one.laddr.ip, one.laddr.port): one.pid for one in sockets if one.laddr}


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


class Watch:
    """Looks all the time for sockets that this process and its descendants open to listen on."""

    def __init__(self) -> None:
        self._before = listening()
        self._family = {os.getpid()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.opened: dict[tuple[str, int], int] = {}  # and the process that did

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            now = listening()
            self._family |= {child.pid for child in psutil.Process().children(recursive=True)}
            self.opened |= {
                one: pid for one, pid in now.items() if pid in self._family and pid and one not in self._before
            }

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """The ranks listened, and everything that listened did so on loopback."""
        assert self.opened, "nothing was seen: the ranks did not reach each other"
        others = sorted(one for one in self.opened if not is_loopback(one[0]))
        assert not others, f"listened to other hosts: {others}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE `vae`, its latents `video.safetensors`, a picture `picture.png`, a pipeline `pipeline`."""
    root = tmp_path_factory.mktemp("models")
    vae("wan2.1").save_pretrained(root / "vae")
    z = latents("wan2.1", frames=1, height=4, width=4)
    latents_file.save(root / "video.safetensors", z, "wan2.1", scaled=False, fps=12)
    Image.new("RGB", (32, 32)).save(root / "picture.png")
    tiny.make_model("wan2.1", root / "pipeline")
    return root


COMMANDS = {
    "decode": "{root}/video.safetensors --model {root}/vae -o {out}/clip.mp4 --num-gpus 2 --grid 2x1",
    "generate": "cat --model-path {root}/pipeline -o {out}/clip.mp4 --size 32x32 --num-frames 1"
    " --num-inference-steps 1 --num-gpus 2",
    "bench": "--model {root}/vae --size 32x32 --frames 1 --modes parallel --num-gpus 2 --repeat 1 -o {out}",
    "validate": "--model-path {root}/vae --size 32x32 --frames 1 --num-gpus 2 -o {out}",
    "calibrate": "--num-gpus 2",
    "demo": "--output {out}",
}


@pytest.mark.parametrize(
    "command",
    [
        "decode",
        *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name != "decode"),
    ],
)
def test_a_command_on_two_ranks_listens_on_loopback_only(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALOVAE_CACHE", str(tmp_path / "cache"))
    words = COMMANDS[command].format(root=folder, out=tmp_path).split()
    with Watch() as watch:
        start = [sys.executable, "-m", "halovae.cli.main", command]
        done = subprocess.run([*start, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    watch.check()


def test_encode_listens_on_nothing(folder: Path, tmp_path: Path) -> None:
    words = ["encode", folder / "picture.png", "--model", folder / "vae", "-o", tmp_path / "z.safetensors"]
    with Watch() as watch:
        done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert not watch.opened


def encode() -> tuple[list[int], str]:
    moments = VAE(vae("wan2.1")).encode(torch.zeros(1, 3, 1, 32, 32), mode="parallel")
    assert moments is not None
    return list(moments.shape), os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.slow
def test_an_encode_on_two_ranks_listens_on_loopback_only() -> None:
    with Watch() as watch:
        assert launch(2, encode) == [([1, 32, 1, 4, 4], "lo")] * 2
    watch.check()


def all_lines() -> tuple[list[int], str | None]:
    """Talk over every kind of process group that a decode or a server makes.

    Returns:
        The ranks, and the interface that gloo was told to listen on: without one it takes the address of the host's
        name, which on some machines is a loopback address too.
    """
    mesh = Mesh(Grid(rows=2), torch.device("cpu"))
    RankZeroBroadcast().send("a word")
    return mesh.transport.all_values(mesh.rank), os.environ.get("GLOO_SOCKET_IFNAME")


def test_ranks_for_measurements_listen_on_loopback_only() -> None:
    with Watch() as watch, Ranks(2) as ranks:
        assert ranks.run(all_lines) == [([0, 1], "lo")] * 2
    watch.check()


def all_lines_until(enough: Path) -> str | None:
    _, interface = all_lines()
    enough.with_name(str(dist.get_rank())).touch()
    wait_for(enough.exists)
    return interface


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _LONG_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(_LOOK_S)


def is_store(port: int) -> bool:
    """Whether torch's TCP store, whose values torch unpickles, answers its VALIDATE and PING at a port."""
    token = b"ping"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as line:
            line.sendall(b"\x00" + (0x3C85F7CE).to_bytes(4, "little") + b"\x0d" + token)
            return line.recv(len(token)) == token
    except OSError:  # nobody there, or one that waits for other words
        return False


def test_the_probe_knows_a_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    assert is_store(store.port)


def test_launch_listens_on_loopback_only_and_a_stranger_finds_no_store(tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    tried: dict[tuple[str, int], bool] = {}

    def attack() -> None:
        try:
            wait_for(lambda: enough.exists() or all((tmp_path / str(rank)).exists() for rank in range(2)))
            there = sorted(watch.opened.keys() & listening().keys())
            with ThreadPoolExecutor() as pool:
                tried.update(zip(there, pool.map(is_store, [port for _, port in there]), strict=True))
        finally:
            enough.touch()

    stranger = threading.Thread(target=attack)
    with Watch() as watch:
        stranger.start()
        try:
            assert launch(2, all_lines_until, enough) == ["lo"] * 2
        finally:
            enough.touch()
            stranger.join()
    assert tried, "no port was tried"
    stores = [one for one, answered in tried.items() if answered]
    assert not stores, f"stores that anybody may write pickles to: {stores}"
    watch.check()


@pytest.mark.parametrize("start", ["launch(2, all_lines_until, enough)", "Ranks(2).run(all_lines_until, enough)"])
def test_ranks_whose_parent_is_killed_remove_the_folder_they_met_in(start: str, tmp_path: Path) -> None:
    script = f"from pathlib import Path; from test_ports import *; enough = Path({str(tmp_path / 'enough')!r}); {start}"
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))
        assert list(tmp_path.glob("halovae-ranks-*"))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not list(tmp_path.glob("halovae-ranks-*")))


@pytest.mark.slow
def test_ranks_whose_server_is_killed_remove_the_folder_they_met_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Server(folder / "pipeline", tmp_path / "served") as server:
        server.wait()
        assert list(tmp_path.glob("halovae-ranks-*"))
    wait_for(lambda: not list(tmp_path.glob("halovae-ranks-*")))


@pytest.fixture
def on_hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Device]:
    """`on_hosts(2)`: the device of a rank of two on so many hosts, without any interface named."""

    def of(hosts: int) -> Device:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // hosts))
        monkeypatch.setattr(Device, "backend", "nccl")  # which needs a name beside gloo's
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)
        return Device(torch.device("cpu"))

    return of


def interfaces() -> tuple[str | None, str | None]:
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("blank", ["", " "])
def test_on_one_host_loopback_is_used_unless_the_user_names_an_interface(
    blank: str, on_hosts: Callable[[int], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = on_hosts(1)
    device.choose_interfaces()
    assert interfaces() == ("lo", "=lo")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, blank)
    device.choose_interfaces()
    assert interfaces() == ("lo", "=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "wire")
    device.choose_interfaces()
    assert interfaces() == ("wire", "=lo")


@pytest.mark.parametrize("named", [None, "", "wire,wire2", "wir", "^lo", "lo", "0.0.0.0"])
@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_on_several_hosts_one_interface_must_be_named(
    variable: str, named: str | None, on_hosts: Callable[[int], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = on_hosts(2)
    address = psutil.net_if_addrs()["lo"]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": address, "wire": [], "wire2": []})
    for each in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(each, "wire")
    device.choose_interfaces()
    assert interfaces() == ("wire", "=wire")
    device.choose_interfaces()
    assert interfaces() == ("wire", "=wire")
    if named is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, named)
    with pytest.raises(ValueError, match=f"{variable}=.*here: wire, wire2"):
        device.choose_interfaces()
