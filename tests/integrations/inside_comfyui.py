"""Runs in ComfyUI's interpreter: compares the pack with ComfyUI's own VAE. Prints the largest differences as JSON.

python inside_comfyui.py COMFYUI PACK VAE_FILE
"""

import importlib.util
import json
import logging
import sys
from typing import Any

_, _FOLDER, _PACK, _FILE = sys.argv
sys.argv = sys.argv[:1]
sys.path.insert(0, _FOLDER)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    spec = importlib.util.spec_from_file_location("pack", f"{_PACK}/__init__.py", submodule_search_locations=[_PACK])
    assert spec is not None
    assert spec.loader is not None
    pack: Any = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = pack
    spec.loader.exec_module(pack)
    decode, encode = pack.NODE_CLASS_MAPPINGS["HalovaeVAEDecode"](), pack.NODE_CLASS_MAPPINGS["HalovaeVAEEncode"]()
    lines = Lines()
    logging.getLogger("pack").addHandler(lines)
    logging.getLogger("pack").setLevel(logging.INFO)
    with torch.inference_mode():  # as ComfyUI runs nodes
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(_FILE), dtype=torch.float32)
        latents = torch.randn(1, 16, 3, 36, 28, generator=torch.Generator().manual_seed(0))
        pixels = torch.rand(9, 64, 48, 3, generator=torch.Generator().manual_seed(1))
        own = vae.decode(latents)
        (once,) = decode.decode({"samples": latents}, vae, "")
        (strips,) = decode.decode({"samples": latents}, vae, "65 MB")
        found = {
            "at once": float((once - own[0]).abs().max()),
            "in strips": float((strips - own[0]).abs().max()),
            "encode": float((encode.encode(pixels, vae, "")[0]["samples"] - vae.encode(pixels)).abs().max()),
            "way": lines.lines[-1],
            "fell back": any("cannot run" in line for line in lines.lines),
        }
    print(json.dumps(found))


main()
