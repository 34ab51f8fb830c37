"""Decodes in a process whose memory is limited: `python capped.py strips|once`.

The limit is what the process takes before the decode, the planned peak of strips and 10 %, and the result. Plans count
tensors, so malloc has to return each one's memory when it is freed: see the variables in `test_memory_cap`.
"""

import resource
import sys
import threading

import torch

import halovae
from halovae.models.architectures import random_vae

MIB = 2**20


def taken() -> int:
    """Bytes of private writable memory, which RLIMIT_DATA limits (getrlimit(2), proc(5))."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024


def main() -> None:
    torch.set_num_threads(1)
    threading.stack_size(MIB)
    vae = halovae.load(random_vae("qwen-image", 16))
    latents = torch.randn(1, 16, 1, 128, 160, generator=torch.Generator().manual_seed(0))
    vae.warmup((1, 16, 1, 16, 16))
    decision = vae.plan(latents.shape, memory_budget=150 * MIB)
    assert decision is not None
    assert decision.chosen.strips is not None
    assert decision.chosen.peak is not None
    result = 3 * 1024 * 1280 * 4
    limit = taken() + int(1.1 * decision.chosen.peak) + result
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if sys.argv[1] == "strips":
        pictures = vae.decode(latents, memory_budget=150 * MIB)
    else:
        pictures = vae.decode(latents, mode="single")
    assert pictures is not None
    print(f"decoded {tuple(pictures.shape)}")


if __name__ == "__main__":
    main()
