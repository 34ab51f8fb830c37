"""Windows that never lie in memory as a whole: Winograd's convolution has their rows made when it reads them.

Before, only those cells are made that other ranks need: the first and the last ones along each dim that is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from halovae.kernels import winograd
from halovae.plane import context
from halovae.plane.operators import Cut
from halovae.plane.rings import Edges, exchange, outermost

# Writes a part of a window's frames within the ring, `[n, C, T, rows, cols]`: of which items, rows and cols of the map.
Interior = Callable[[slice, slice, slice, Tensor], None]
_ALL, _ROWS, _COLS = slice(None), -2, -1


class Bands(winograd.Bands):
    """A window as `rings.window` has it, made of a map some rows at a time.

    Args:
        interior: writes what is within the ring, but for frames of zeros.
        x: the map, `[N, C, T, H, W]` or `[N, C, H, W]`.
        frames: how many the window has.
        before: so many of them at the beginning are zeros,
        after: and so many at the end.
        exchanged: the frames that ranks exchange cells of.
        cuts: the dims of `x` along which other ranks have what this one needs.
        edges: what the rest of the ring is made of; None for zeros.
    """

    def __init__(
        self, interior: Interior, x: Tensor, frames: int, before: int, after: int, exchanged: slice,
        cuts: Sequence[Cut], edges: Edges | None,
    ) -> None:  # fmt: skip
        self.x = x if x.ndim == 5 else x.unsqueeze(2)
        self._interior, self._exchanged, self._cuts, self._ndim = interior, exchanged, cuts, x.ndim
        self._zeros = slice(before), slice(frames - after, frames)
        self._extents = {_ROWS: x.shape[_ROWS], _COLS: x.shape[_COLS]}
        self._inwards = 1 if edges is None or edges[0] == "replicate" else 2
        left, right, top, bottom = (False,) * 4 if edges is None else edges[1]
        self._repeated = {_ROWS: (top, bottom), _COLS: (left, right)}
        # For each dim that is cut: what is before the map, its first cells, its last ones, and what is after it. Along
        # cols with those of the rows around the map: the corners.
        self._lines = {dim: self._line(dim, frames) for dim in (cut[0] - x.ndim for cut in cuts)}

    def _line(self, dim: int, frames: int) -> Tensor:
        height, width = self._extents.values()
        plane = (4, width) if dim == _ROWS else (height + 2, 4)
        _, pool = context.current_kernels(self.x)
        line = pool.empty((*self.x.shape[:2], frames, *plane), self.x.dtype).zero_()
        inner = line if dim == _ROWS else line[..., 1:-1, :]
        for at, cell in ((1, 0), (2, self._extents[dim] - 1)):
            part = slice(cell, cell + 1)
            rows, cols = (part, _ALL) if dim == _ROWS else (_ALL, part)
            self._interior(_ALL, rows, cols, inner.narrow(dim, at, 1))
        return line

    def start(self) -> Callable[[], None]:
        """Start the exchange; returns what waits for it. If cols are cut, all is there at once."""
        later: list[Callable[[], None]] = []

        def finish() -> None:
            while later:
                later.pop(0)()

        for cut in self._cuts:
            finish()
            dim = cut[0] - self._ndim
            if dim == _COLS:
                self._add_corners()
            line = self._lines[dim][:, :, self._exchanged]
            line = line if self._ndim == 5 else line.squeeze(2)
            if dim == _COLS and _ROWS not in self._lines:
                line = line[..., 1:-1, :]
            later.append(exchange(*outermost(line, dim), cut))
        if _COLS in self._lines:
            finish()
        return finish

    def _add_corners(self) -> None:
        """Give the lines along cols their cells of the rows around the map, which travel, too."""
        if _ROWS not in self._lines:
            return
        height, width = self._extents.values()
        cols, rows = self._lines[_COLS], self._lines[_ROWS]
        for at, (target, source) in enumerate(((0, self._inwards), (height + 1, height + 1 - self._inwards))):
            if self._repeated[_ROWS][at]:
                cols[..., target, 1:3].copy_(cols[..., source, 1:3])
            else:
                cols[..., target, 1].copy_(rows[..., 3 * at, 0])
                cols[..., target, 2].copy_(rows[..., 3 * at, width - 1])

    def write(self, item: int, start: int, rows: slice, band: Tensor) -> None:
        """Write rows of a band, `[C, T, L, W + 2]`, which begins at the row `start` of an item's window.

        All but those around the map can be written before other ranks' cells are there, unless cols are cut.
        """
        height, width = self._extents.values()
        items, band = slice(item, item + 1), band.unsqueeze(0)
        begin, end = start + rows.start, start + rows.stop
        out = band[..., rows, :]
        for frames in self._zeros:
            out[:, :, frames].zero_()
        first, last = max(begin, 1), min(end, height + 1)
        if first < last:
            inner = out[..., first - begin : last - begin, 1:-1]
            self._interior(items, slice(first - 1, last - 1), _ALL, inner)
        repeated = []
        for at, (row, source) in enumerate(((0, self._inwards), (height + 1, height + 1 - self._inwards))):
            if begin <= row < end:
                line = band[..., row - start : row - start + 1, :]
                if self._repeated[_ROWS][at]:
                    repeated.append((line, band[..., source - start : source - start + 1, :]))
                elif _ROWS in self._lines:
                    line[..., 1:-1].copy_(self._lines[_ROWS][items, ..., 3 * at : 3 * at + 1, :])
                else:
                    line.zero_()
        for at, (col, source) in enumerate(((0, self._inwards), (width + 1, width + 1 - self._inwards))):
            side = out[..., col : col + 1]
            if self._repeated[_COLS][at]:
                side.copy_(out[..., source : source + 1])
            elif _COLS in self._lines:
                side.copy_(self._lines[_COLS][items, ..., begin:end, 3 * at : 3 * at + 1])
            else:
                side.zero_()
        for line, inner in repeated:
            line.copy_(inner)
