"""Time and memory of one device that decodes in strips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from rich.table import Table

from halovae.errors import UnplannableError
from halovae.grid import Grid
from halovae.plane.layout import MeshDim
from halovae.plane.strip_program import InStrips
from halovae.plane.strips import NarrowStripError
from halovae.planning.decision import Candidate
from halovae.planning.search import Search

COUNTS = (2, 4, 8, 16, 32)
WAYS = ((False, False), (False, True), (True, False), (True, True))  # computing maps again, with lines on the host


def frontier(search: Search, describe: Callable[[str], None], on_step: Callable[[], None]) -> list[Candidate]:
    """Price a decode on one device, at once and in strips of both axes, as far as there are rows and cols for them.

    Args:
        search: prices it.
        describe: is told what is priced next.
        on_step: is called after each.
    """
    describe("at once")
    found = [search.price(Grid())]
    on_step()
    axes: tuple[MeshDim, ...] = "rows", "cols"
    for mesh_dim in axes:
        seen: set[tuple[int, int | None]] = set()
        for recompute, host in WAYS:
            for count in COUNTS:
                strips = InStrips(count, mesh_dim, recompute, host)
                describe(str(strips))
                if (recompute and not search.strips_wait) or (host and not search.has_host):
                    on_step()
                    continue
                with suppress(NarrowStripError, UnplannableError):
                    one = search.price_strips(strips)
                    assert one.strips is not None
                    if (one.strips.count, one.peak) not in seen:  # otherwise nothing is computed again or moved
                        found.append(one)
                        seen.add((one.strips.count, one.peak))
                on_step()
    return sorted(found, key=lambda one: (-(one.peak or 0), one.seconds))


def frontier_table(found: Sequence[Candidate], title: str) -> Table:
    """Return a table of ways, the one that takes most memory first."""
    table = Table(title=title, title_justify="left", caption="memory besides weights and the result")
    for column in ("way", "peak (MiB)", "of at once", "time (s)", "of at once"):
        table.add_column(column, justify="left" if column == "way" else "right")
    (whole,) = (one for one in found if one.strips is None)
    for one in found:
        peak = one.peak or 0
        table.add_row(
            "at once" if one.strips is None else str(one.strips), f"{peak / 2**20:,.0f}",
            f"{peak / (whole.peak or 1):.2f}", f"{one.seconds:.3g}", f"{one.seconds / whole.seconds:.2f}",
        )  # fmt: skip
    return table
