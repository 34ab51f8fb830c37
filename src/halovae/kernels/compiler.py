"""Compile `native.cpp` with this machine's C++ compiler, and keep the library in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from importlib.resources import files
from pathlib import Path

from filelock import FileLock

from halovae.device.kinds import cache_folder
from halovae.kernels.schemes import SCHEMES

_COMPILERS = "g++", "clang++", "c++"
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
_NATIVE = ("-march=native",), ("-mcpu=native",), ()  # compilers' flags for this machine's instructions
_SECONDS = 120  # limit for one run of a compiler
_LOCKED = 30  # seconds to wait while another process compiles


def loaded(cache_checked: threading.Event | None = None) -> ctypes.CDLL:
    """Return the library from the cache folder. If none there can be loaded, set `cache_checked` and compile one."""
    commands = _commands()
    source = _matrices() + files("halovae.kernels").joinpath("native.cpp").read_text(encoding="utf-8")
    # The compiler's predefined macros: its version and this machine's instructions.
    macros = _first([[*command, "-x", "c++", "-dM", "-E", "-"] for command in commands], "")
    digest = hashlib.sha256("\0".join((macros, source, *commands[0])).encode()).hexdigest()
    path = cache_folder().resolve() / f"kernels-{digest[:16]}.so"
    with contextlib.suppress(OSError):  # missing, broken, or built for another C library
        return ctypes.CDLL(str(path))
    if cache_checked is not None:
        cache_checked.set()
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.parent / "kernels.lock", timeout=_LOCKED))
            with contextlib.suppress(OSError):  # another process was faster
                return ctypes.CDLL(str(path))
            for left in path.parent.glob("kernels-*.tmp"):  # left by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            folder = tempfile.mkdtemp(prefix="kernels-", suffix=".tmp", dir=path.parent)
        except (OSError, NotImplementedError):  # no writing or locking in the folder, or it was locked for too long
            folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        built = Path(folder) / path.name
        end = ["-x", "c++", "-", "-o", str(built)]
        _first([[*command, *openmp, *end] for openmp in (["-fopenmp"], []) for command in commands], source)
        functions = ctypes.CDLL(str(built))  # it stays loaded when the folder is removed
        with contextlib.suppress(OSError), built.open("rb") as file:
            os.fsync(file.fileno())  # a truncated library would crash processes that load it
            built.replace(path)  # other processes may do so at the same time
    return functions


def _commands() -> list[list[str]]:
    """The compiler commands to try, best first."""
    try:
        preferred = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']}: {error}") from None
    candidates = (preferred, *([name] for name in _COMPILERS))
    compilers = [command for command in candidates if command and shutil.which(command[0])]
    if not compilers:
        raise OSError(f"no C++ compiler: CXX names none, and none of {', '.join(_COMPILERS)} is installed")
    return [[*command, *_FLAGS, *native] for command in compilers for native in _NATIVE]


def _first(commands: list[list[str]], source: str) -> str:
    """Run commands on a source until one succeeds, and return its output."""
    message = ""
    for command in commands:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            errors="replace", start_new_session=True,
        ) as running:  # fmt: skip
            try:
                output, errors = running.communicate(source, timeout=_SECONDS)
            except BaseException as error:
                os.killpg(running.pid, signal.SIGKILL)  # a compiler is several processes
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise OSError(f"{command[0]} took more than {_SECONDS} s") from None
        if not running.returncode:
            return output
        message = message or errors.strip()[-500:]
    raise OSError(f"{commands[0][0]} failed: {message}")


def _matrices() -> str:
    """The matrices of the schemes as C++ source."""
    text = []
    for name, how in SCHEMES.items():
        members = [f"static constexpr int step = {how.step};"]
        for of, matrix in (("input_transform", how.input_transform), ("output_transform", how.output_transform)):
            rows = ", ".join("{" + ", ".join(f"{float(value)!r}f" for value in row) + "}" for row in matrix)
            members.append(f"static constexpr float {of}[{len(matrix)}][{len(matrix[0])}] = {{{rows}}};")
        text.append(f"struct {name.capitalize()} {{ {' '.join(members)} }};\n")
    return "".join(text)
