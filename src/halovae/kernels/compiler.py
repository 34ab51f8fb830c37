"""The library of `native.cpp`: compiled by this machine's C++ compiler, and kept in the cache folder."""

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
_NATIVE = ("-march=native",), ("-mcpu=native",), ()  # what a compiler may call this machine's instructions
_SECONDS = 120  # that a compiler may take
_LOCKED = 30  # and so long others wait for the one that compiles


def loaded(looked: threading.Event | None = None) -> ctypes.CDLL:
    """The library from the cache folder; if there is none that can be loaded, `looked` is set, and it is compiled."""
    commands = _commands()
    source = _matrices() + files("halovae.kernels").joinpath("native.cpp").read_text(encoding="utf-8")
    # What this machine's instructions and the compiler's version are, as far as the compiler knows.
    about = _first([[*command, "-x", "c++", "-dM", "-E", "-"] for command in commands], "")
    digest = hashlib.sha256("\0".join((about, source, *commands[0])).encode()).hexdigest()
    path = cache_folder().resolve() / f"kernels-{digest[:16]}.so"
    with contextlib.suppress(OSError):  # there is none, or it is broken, or for another C library
        return ctypes.CDLL(str(path))
    if looked is not None:
        looked.set()
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.parent / "kernels.lock", timeout=_LOCKED))
            with contextlib.suppress(OSError):  # another process was faster
                return ctypes.CDLL(str(path))
            for left in path.parent.glob("kernels-*.tmp"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            folder = tempfile.mkdtemp(prefix="kernels-", suffix=".tmp", dir=path.parent)
        except (
            OSError,
            NotImplementedError,
        ):  # not to be written to, or to be locked, or locked for long
            folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        made = Path(folder) / path.name
        end = ["-x", "c++", "-", "-o", str(made)]
        _first([[*command, *openmp, *end] for openmp in (["-fopenmp"], []) for command in commands], source)
        functions = ctypes.CDLL(str(made))  # what is loaded stays so when the folder goes
        with contextlib.suppress(OSError), made.open("rb") as file:
            os.fsync(file.fileno())  # to load a part of a library ends the process
            made.replace(path)  # other processes may be at it, too
    return functions


def _commands() -> list[list[str]]:
    """How a compiler may be asked for this machine's code, the best first."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']}: {error}") from None
    found = [one for one in (asked, *([name] for name in _COMPILERS)) if one and shutil.which(one[0])]
    if not found:
        raise OSError(f"no C++ compiler: CXX names none, and there is none of {', '.join(_COMPILERS)}")
    return [[*one, *_FLAGS, *native] for one in found for native in _NATIVE]


def _first(commands: list[list[str]], source: str) -> str:
    """What the first command that succeeds says of a source."""
    said = ""
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
        said = said or errors.strip()[-500:]
    raise OSError(f"{commands[0][0]} failed: {said}")


def _matrices() -> str:
    """The schemes as C++ has them."""
    text = []
    for name, how in SCHEMES.items():
        members = [f"static constexpr int step = {how.step};"]
        for of, matrix in (("spread", how.spread), ("merge", how.merge)):
            rows = ", ".join("{" + ", ".join(f"{float(value)!r}f" for value in row) + "}" for row in matrix)
            members.append(f"static constexpr float {of}[{len(matrix)}][{len(matrix[0])}] = {{{rows}}};")
        text.append(f"struct {name.capitalize()} {{ {' '.join(members)} }};\n")
    return "".join(text)
