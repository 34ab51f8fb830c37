"""Estimate calibrations of devices that could not be measured, from data sheets and published figures.

    python scripts/estimate_devices.py

`halovae calibrate` on such a device writes a measured calibration, which may replace the estimate.
"""

from __future__ import annotations

from pathlib import Path

from halovae.distributed.transport import Link
from halovae.planning.calibration import OTHER, Calibration, Rates

FOLDER = Path(__file__).parent.parent / "src" / "halovae" / "planning" / "devices"


def estimated(
    kind: str, name: str, origin: str, convolve: float, multiply: float, memory: float, launch: float,
    near: Link, far: Link,
) -> Calibration:  # fmt: skip
    """Make a calibration from FLOP/s of convolutions and of matrix multiplications, bytes/s, and seconds per launch."""
    passes = Rates(calls=launch, bytes=1 / memory)
    table = {
        OTHER: passes,
        "view": Rates(calls=launch / 4),
        "convolution": Rates(calls=launch, flops=1 / convolve, bytes=1 / memory),
        "linear": Rates(calls=launch, flops=1 / multiply, bytes=1 / memory),
        "scaled_dot_product_attention": Rates(calls=launch, flops=1 / multiply, bytes=1 / memory),
    }
    links = {"host": near, "hosts": far}
    return Calibration(name, kind, origin, table, table, links, links)


DEVICES = {
    # Others measured 790 TFLOP/s in bf16 matrix multiplications. SGLang's published decode of 1280x704x61 spends 1.26 s
    # in convolutions, whose least work is about 445 TFLOP. The data sheet says 4.8 TB/s of memory bandwidth; passes
    # reach two thirds of it. NVLink: 450 GB/s each way. Between hosts: one 400 Gbit/s adapter per device.
    "cuda-h200": estimated(
        "cuda", "NVIDIA H200", "estimated from data sheets and published decodes, bf16", 350e12, 600e12, 3.2e12, 6e-6,
        Link(30e-6, 1 / 350e9), Link(50e-6, 1 / 45e9),
    ),
    # The data sheet of the 910B3 says 313 TFLOP/s in fp16, 1.6 TB/s, and 56 GB/s over HCCS to each other device. The
    # same shares of these as on the H200 are assumed.
    "npu-ascend-910b": estimated(
        "npu", "Ascend 910B3", "estimated from data sheets, fp16 and bf16", 110e12, 190e12, 1.05e12, 12e-6,
        Link(60e-6, 1 / 45e9), Link(80e-6, 1 / 22e9),
    ),
}  # fmt: skip

if __name__ == "__main__":
    for name, calibration in DEVICES.items():
        (FOLDER / f"{name}.json").write_text(calibration.as_json() + "\n")
