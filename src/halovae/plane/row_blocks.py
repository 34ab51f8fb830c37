"""Windows computed in row blocks: Winograd's convolution computes their rows when it reads them.

Only the cells that other ranks need are computed in advance: the first and the last ones along each dim that is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from halovae.kernels import winograd
from halovae.plane import backends, context
from halovae.plane.operators import Cut
from halovae.plane.rings import Edges, exchange, outermost

# Writes a piece of a window within the ring, `[n, C, T, rows, cols]`: for these items, rows, and cols of the map.
Interior = Callable[[slice, slice, slice, Tensor], None]
_ALL, _ROWS, _COLS = slice(None), -2, -1


class RowBlocks(winograd.RowBlocks):
    """The window of `rings.window`, computed from a map in row blocks.

    Args:
        interior: writes the window within the ring, except frames of zeros.
        x: the map, `[N, C, T, H, W]` or `[N, C, H, W]`.
        frames: the number of frames of the window.
        before: the number of frames of zeros at the beginning.
        after: the number of frames of zeros at the end.
        exchanged: the frames whose cells ranks exchange.
        cuts: the dims of `x` along which other ranks have cells that this one needs.
        edges: what fills the ring at the picture's edges, as `rings.Edges`; None for zeros.
        beyond: how many rows and cols of the ring `interior` knows, 0 or 1 at the top, bottom, left and right.
    """

    def __init__(
        self, interior: Interior, x: Tensor, frames: int, before: int, after: int, exchanged: slice,
        cuts: Sequence[Cut], edges: Edges | None, beyond: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:  # fmt: skip
        self.x = x if x.ndim == 5 else x.unsqueeze(2)
        self._interior, self._exchanged, self._cuts, self._ndim = interior, exchanged, cuts, x.ndim
        self._zeros = slice(before), slice(frames - after, frames)
        self._extents = {_ROWS: x.shape[_ROWS], _COLS: x.shape[_COLS]}
        self._inwards = 1 if edges is None or edges[0] == "replicate" else 2
        left, right, top, bottom = (False,) * 4 if edges is None else edges[1]
        self._beyond = {_ROWS: beyond[:2], _COLS: beyond[2:]}
        self._repeated = {_ROWS: (top, bottom), _COLS: (left, right)}
        # For each dim that is cut, four border rows (or cols): the halo before the map, the map's first and last one,
        # and the halo after the map. Border cols include the cells of the rows around the map: the corners.
        self._borders = {dim: self._border(dim, frames) for dim in (cut[0] - x.ndim for cut in cuts)}

    def _border(self, dim: int, frames: int) -> Tensor:
        """Allocate the border rows (or cols) of a dim, and compute the map's own."""
        height, width = self._extents.values()
        plane = (4, width) if dim == _ROWS else (height + 2, 4)
        _, pool = context.current_kernels(self.x)
        border = pool.empty((*self.x.shape[:2], frames, *plane), self.x.dtype).zero_()
        inner = border if dim == _ROWS else border[..., 1:-1, :]
        for at, cell in ((1, 0), (2, self._extents[dim] - 1)):
            span = slice(cell, cell + 1)
            rows, cols = (span, _ALL) if dim == _ROWS else (_ALL, span)
            self._interior(_ALL, rows, cols, inner.narrow(dim, at, 1))
        return border

    def start(self) -> Callable[[], None]:
        """Start the halo exchange; return a function that waits for it. If cols are cut, wait before returning."""
        later: list[Callable[[], None]] = []

        def finish() -> None:
            while later:
                later.pop(0)()

        for cut in self._cuts:
            finish()
            dim = cut[0] - self._ndim
            if dim == _COLS:
                self._add_corners()
            border = self._borders[dim][:, :, self._exchanged]
            border = border if self._ndim == 5 else border.squeeze(2)
            if dim == _COLS and _ROWS not in self._borders:
                border = border[..., 1:-1, :]
            later.append(exchange(*outermost(border, dim), cut))
        if _COLS in self._borders:
            finish()
        return finish

    def _add_corners(self) -> None:
        """Copy the corners from the border rows to the border cols, which also exchange them."""
        if _ROWS not in self._borders:
            return
        height, width = self._extents.values()
        cols, rows = self._borders[_COLS], self._borders[_ROWS]
        for at, (target, source) in enumerate(((0, self._inwards), (height + 1, height + 1 - self._inwards))):
            if self._repeated[_ROWS][at]:
                cols[..., target, 1:3].copy_(cols[..., source, 1:3])
            else:
                cols[..., target, 1].copy_(rows[..., 3 * at, 0])
                cols[..., target, 2].copy_(rows[..., 3 * at, width - 1])

    def surround(self, window: Tensor) -> None:
        """Write the ring of the map upsampled by two, along dims that are cut, after the exchange has ended.

        Args:
            window: `[N, C, 2H, 2W]`, with one cell more at both ends of dims that are cut.
        """
        repeat = backends.kernels(window.device.type).upsample
        (above, beside), corners = ((dim in self._borders) for dim in (_ROWS, _COLS)), len(self._borders) == 2
        for at, place in enumerate((slice(0, 1), slice(-1, None))):
            side = slice(3 * at, 3 * at + 1)
            if above:
                inner = window[..., place, 1:-1] if beside else window[..., place, :]
                repeat(self._borders[_ROWS][:, :, 0, side], (1, 2), inner)
            if beside:
                cols = self._borders[_COLS][:, :, 0, :, side]
                repeat(cols[..., 1:-1, :], (2, 1), window[..., 1:-1, place] if above else window[..., place])
                for row in (slice(0, 1), slice(-1, None)) if corners else ():
                    window[..., row, place].copy_(cols[..., row, :])

    def write(self, item: int, start: int, rows: slice, block: Tensor) -> None:
        """Write some rows of a row block `[C, T, L, W + 2]` that begins at the row `start` of an item's window.

        Unless cols are cut, all rows but those around the map can be written before other ranks' cells arrive.
        """
        height, width = self._extents.values()
        items, block = slice(item, item + 1), block.unsqueeze(0)
        begin, end = start + rows.start, start + rows.stop
        out = block[..., rows, :]
        for frames in self._zeros:
            out[:, :, frames].zero_()
        (top, bottom), (left, right) = self._beyond.values()
        first, last = max(begin, 1 - top), min(end, height + 1 + bottom)
        if first < last:
            inner = out[..., first - begin : last - begin, 1 - left : width + 1 + right]
            self._interior(items, slice(first - 1, last - 1), slice(-left, width + right), inner)
        repeated = []
        for at, (row, source) in enumerate(((0, self._inwards), (height + 1, height + 1 - self._inwards))):
            if begin <= row < end and not self._beyond[_ROWS][at]:
                border = block[..., row - start : row - start + 1, :]
                if self._repeated[_ROWS][at]:
                    repeated.append((border, block[..., source - start : source - start + 1, :]))
                elif _ROWS in self._borders:
                    border[..., 1:-1].copy_(self._borders[_ROWS][items, ..., 3 * at : 3 * at + 1, :])
                else:
                    border.zero_()
        for at, (col, source) in enumerate(((0, self._inwards), (width + 1, width + 1 - self._inwards))):
            side = out[..., col : col + 1]
            if self._beyond[_COLS][at]:
                continue
            if self._repeated[_COLS][at]:
                side.copy_(out[..., source : source + 1])
            elif _COLS in self._borders:
                side.copy_(self._borders[_COLS][items, ..., begin:end, 3 * at : 3 * at + 1])
            else:
                side.zero_()
        for border, inner in repeated:
            border.copy_(inner)


def upsampled_window(x: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, list[int]]:
    """Upsample a map by two, with other ranks' cells around it, by a kernel that writes each cell once.

    Halos travel at the low resolution while the map is upsampled.

    Args:
        x: the map, `[N, C, H, W]`.
        cuts: the dims of `x` along which this rank needs halos.

    Returns:
        The map with one cell more at both ends of dims that are cut, and the padding by zeros of rows and cols that a
        convolution of it needs.
    """

    def interior(items: slice, rows: slice, cols: slice, out: Tensor) -> None:
        out[:, :, 0].copy_(x[items, :, rows, cols])

    blocks = RowBlocks(interior, x, 1, 0, 0, slice(1), cuts, None)
    cut = {dim - x.ndim for dim, *_ in cuts}
    finish = blocks.start()
    try:
        rows, cols = (2 * x.shape[dim] + 2 * (dim in cut) for dim in (_ROWS, _COLS))
        _, pool = context.current_kernels(x)
        window = pool.empty((*x.shape[:2], 1, rows, cols), x.dtype)[:, :, 0]
        inner = window[..., 1:-1, :] if _ROWS in cut else window
        backends.kernels(x.device.type).upsample(x, (2, 2), inner[..., 1:-1] if _COLS in cut else inner)
    finally:
        finish()  # also after an error: other ranks' messages are under way
    blocks.surround(window)
    return window, [int(dim not in cut) for dim in (_ROWS, _COLS)]
