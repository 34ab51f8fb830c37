"""The memory that a user allows, as text."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base ** (power + 1)
    for power, letter in enumerate("KMG")
    for end, base in (("B", 1000), ("IB", 1024))
}
FREE = ("", "FREE", "FREE VRAM", "AUTO")  # text that leaves it to what is free when a decode begins


def parse_budget(text: str) -> int | None:
    """Return a number of bytes; None for what is free.

    Args:
        text: such as "6GiB", "6.5 GB", or "800 MiB"; "" or "free VRAM" for what is free.

    Raises:
        ValueError: the text is something else.
    """
    stripped = " ".join(text.upper().split())
    if stripped in FREE:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?B?)", stripped)
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(f"memory budget {text!r}: expected a size such as 6GiB or 800 MB, or nothing for what is free")
    return size
