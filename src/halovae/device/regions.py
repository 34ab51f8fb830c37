"""The parts of a decode, as profilers show them; `halovae bench --profile` sums them up."""

from torch.profiler import record_function

PREFIX = "halovae/"


def region(name: str) -> record_function:
    """A stretch of work that belongs to a submodule, or to gathers or conversion; parts do not hold one another."""
    return record_function(PREFIX + name)
