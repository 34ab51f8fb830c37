"""The parts of a decode, as profilers show them; `halovae bench --profile` sums them up.

On the plane path, a part is a submodule.
"""

from torch.profiler import record_function

PARTS = ("convolution", "norm", "attention", "copies", "exchange", "gather", "conversion")
PREFIX = "halovae/"


def part(name: str) -> record_function:
    """A stretch of work that belongs to one of `PARTS`, or to a submodule; parts do not hold one another."""
    return record_function(PREFIX + name)
