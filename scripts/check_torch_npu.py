"""Check that torch_npu has every name that halovae calls on an accelerator's module, without importing torch_npu.

    pip download torch_npu --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --python-version 3.11
    python scripts/check_torch_npu.py torch_npu-*.whl

torch_npu can only be imported on machines with Ascend's drivers. Its published wheel can be read anywhere.
"""

from __future__ import annotations

import argparse
import ast
import sys
import zipfile
from pathlib import Path

# Expressions for torch's module of a device in our sources.
MODULES = ("module", "_module(name)", "_module(kind)", "utils")
SOURCES = Path(__file__).parent.parent / "src" / "halovae"
FILES = ("device/captures.py", "device/copies.py", "device/kinds.py", "device/memory.py", "runtime/plane_call.py")


def names_called() -> set[str]:
    """Return the attributes that halovae uses of a device's module, or of its `utils`."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse((SOURCES / path).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in MODULES:
                names.add(node.attr)
    return names


def names_offered(wheel: Path) -> dict[str, str]:
    """Return the names that `torch_npu.npu` and its files define, each with the file that has it."""
    offered = {}
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            path = Path(name)
            if path.parent.as_posix() == "torch_npu/npu" and path.suffix == ".py":
                offered[path.stem] = name
                for node in ast.parse(files.read(name)).body:
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                        offered[node.name] = name
    return offered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    offered = names_offered(wheel)
    called = sorted(names_called())
    for name in called:
        print(f"torch.npu.{name}: {offered.get(name, 'MISSING')}")
    missing = [name for name in called if name not in offered]
    print(f"{wheel.name}: {len(called) - len(missing)} of {len(called)} names are there")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
