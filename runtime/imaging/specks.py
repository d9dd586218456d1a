"""Pieces of a mask: its specks, which a tool or a hand has left far from the object, and its large pieces."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import warn
from runtime.imaging.boxes import Box

_SHARE = 0.001
"""A piece smaller than this part of the largest may be a speck."""
_DISTANCE = 0.5
"""A piece farther from the largest than this part of its longer side may be a speck."""
_MOST_RUNS = 300_000
"""Runs of pixels in a row; a mask of more is noise, and is taken as it is."""


class _Piece(NamedTuple):
    pixels: int
    box: Box


def without_specks(mask: NDArray[np.bool_], name: str, can_be_kept: bool = True) -> NDArray[np.bool_]:
    """Returns the mask without its specks, or the mask itself where it has none; warns of what it leaves out.

    A speck is a connected piece (diagonals connect) of less than 0.1 % of the largest piece's pixels, farther
    from that than half its longer side. Distances are those of the bounding boxes.

    Args:
        mask: (H, W).
        name: what to call it in the warning.
        can_be_kept: whether the request has a `keep_specks`, which the warning then names.
    """
    rows, starts, ends = _runs(mask)
    if not 1 < len(rows) <= _MOST_RUNS:
        return mask
    labels = _connected(rows, starts, ends)
    pieces = _pieces(labels, rows, starts, ends)
    largest = max(pieces.values())
    specks = {label for label, piece in pieces.items() if _is_speck(piece, largest)}
    if not specks:
        return mask
    result: NDArray[np.bool_] = mask.copy()
    for run in np.flatnonzero(np.isin(labels, list(specks))):
        result[rows[run], starts[run] : ends[run]] = False
    pixels = sum(pieces[label].pixels for label in specks)
    remedy = "; --keep-specks, or keep_specks in a request, keeps them" if can_be_kept else ""
    warn(f"{name} has specks, {pixels} of its pixels, far from the rest: they are dropped{remedy}")
    return result


def large_pieces(mask: NDArray[np.bool_], share: float = 1.0) -> NDArray[np.bool_]:
    """Returns the connected pieces of a mask (diagonals connect) that have a share of the largest one's
    pixels.

    A mask that is noise is returned as it is.

    Args:
        mask: (H, W).
        share: 1 for the largest piece alone.
    """
    rows, starts, ends = _runs(mask)
    if not 1 < len(rows) <= _MOST_RUNS:
        return mask
    labels = _connected(rows, starts, ends)
    pixels = np.bincount(labels, weights=ends - starts)
    kept = pixels[labels] >= share * pixels.max()
    return _filled(mask.shape, rows[kept], starts[kept], ends[kept])


def reached_from_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns what of a mask (H, W) is connected to the picture's border, by sides of pixels and not by
    corners."""
    rows, starts, ends = _runs(mask)
    if not 1 < len(rows) <= _MOST_RUNS:
        return mask
    height, width = mask.shape
    labels = _connected(rows, starts, ends, diagonals=False)
    at_border = (rows == 0) | (rows == height - 1) | (starts == 0) | (ends == width)
    kept = np.isin(labels, labels[at_border])
    return _filled(mask.shape, rows[kept], starts[kept], ends[kept])


def _filled(
    shape: tuple[int, ...], rows: NDArray[np.intp], starts: NDArray[np.intp], ends: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Returns the mask of some runs."""
    edges = np.zeros((shape[0], shape[1] + 1), np.int8)
    edges[rows, starts] += 1
    edges[rows, ends] -= 1
    return edges.cumsum(axis=1, dtype=np.int8)[:, :-1].astype(np.bool_)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Returns row, first column and column after the last of every run of set pixels, row by row."""
    height, width = mask.shape
    framed = np.zeros((height, width + 2), np.bool_)
    framed[:, 1:-1] = mask
    flat = framed.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    rows, starts = np.divmod(changes[::2], width + 2)
    return rows, starts, changes[1::2] - rows * (width + 2)


def _connected(
    rows: NDArray[np.intp], starts: NDArray[np.intp], ends: NDArray[np.intp], diagonals: bool = True
) -> NDArray[np.intp]:
    """Returns the piece that each run belongs to, as the number of one of its runs.

    Args:
        rows: of the runs; see `_runs`.
        starts: likewise.
        ends: likewise.
        diagonals: whether pixels that share a corner are connected.
    """
    over = 0 if diagonals else 1
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    row_of, start_of, end_of = rows.tolist(), starts.tolist(), ends.tolist()
    above = 0
    for run, row in enumerate(row_of):
        # of the runs in the row above, those that end before this one begins meet none of those that follow
        while row_of[above] < row - 1 or (row_of[above] == row - 1 and end_of[above] < start_of[run] + over):
            above += 1
        met = above
        while row_of[met] == row - 1 and start_of[met] <= end_of[run] - over:
            parents[root(met)] = root(run)
            met += 1
    return np.array([root(run) for run in parents])


def _pieces(
    labels: NDArray[np.intp], rows: NDArray[np.intp], starts: NDArray[np.intp], ends: NDArray[np.intp]
) -> dict[int, _Piece]:
    order = np.argsort(labels, kind="stable")
    names, first = np.unique(labels[order], return_index=True)
    columns = (
        np.add.reduceat((ends - starts)[order], first),
        np.minimum.reduceat(starts[order], first),
        np.minimum.reduceat(rows[order], first),
        np.maximum.reduceat(ends[order], first),
        np.maximum.reduceat(rows[order], first) + 1,
    )
    table = np.stack(columns, axis=1).tolist()
    return {name: _Piece(pixels, Box(*box)) for name, (pixels, *box) in zip(names.tolist(), table)}


def _is_speck(piece: _Piece, largest: _Piece) -> bool:
    a, b = piece.box, largest.box
    gap = math.hypot(max(0, a.x0 - b.x1, b.x0 - a.x1), max(0, a.y0 - b.y1, b.y0 - a.y1))
    far = gap > _DISTANCE * max(b.width, b.height)
    return far and piece.pixels < _SHARE * largest.pixels
