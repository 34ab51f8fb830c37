"""Profiler regions of a decode; `halovae bench --profile` sums their times."""

from torch.profiler import record_function

PREFIX = "halovae/"


def region(name: str) -> record_function:
    """A profiler region for the work of a submodule, for gathers, or for conversion. Regions are not nested."""
    return record_function(PREFIX + name)
