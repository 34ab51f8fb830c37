"""What `import halovae` brings along, and what it must not."""

import subprocess
import sys

import halovae


def test_import_is_lean() -> None:
    script = (
        "import sys, halovae, halovae.ray; halovae.load, halovae.parallelize, halovae.Grid;"
        "print([name for name in ('diffusers', 'transformers', 'fastapi', 'av', 'matplotlib', 'skimage', 'ray',"
        " 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_that_is_exported_is_there() -> None:
    assert [name for name in halovae.__all__ if not hasattr(halovae, name)] == []
