"""Which documents a sample holds, where samples are made of whole documents.

Rows are made once, before training: each of one document, or packed with several. A sample is one row, drawn as a
window of a text is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.corpus import Corpus, document_lengths, tokens_besides

Row = list[int]
"""Numbers of documents."""


class Rows(NamedTuple):
    """Of a corpus."""

    training: list[Row]
    held_out: list[Row]
    """A twentieth of the tokens at most, or one document; empty where there is only one."""


def make_rows(lengths: npt.NDArray[np.int64], sequence_length: int, besides: int, packs: bool) -> Rows:
    """Rows of documents.

    Args:
        lengths: tokens of each document; those that leave no position are left out.
        besides: tokens that a document has more than positions in a sample.
        packs: put several into a row; else each document is one.
    """
    positions = lengths - besides
    usable = np.flatnonzero(positions > 0)
    is_held_out = _held_out(lengths[usable])
    parts = usable[~is_held_out], usable[is_held_out]
    if not packs:
        return Rows(*([[int(number)] for number in part] for part in parts))
    return Rows(
        *([[int(part[k]) for k in row] for row in pack(positions[part].tolist(), sequence_length)] for part in parts)
    )


def held_out_documents(corpus: Corpus, objective: str) -> int:
    """How many of a corpus are not trained on."""
    lengths = document_lengths(corpus)
    return int(_held_out(lengths[lengths > tokens_besides(objective)]).sum())


def _held_out(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The last documents, as many as have a twentieth of the tokens at most; the shortest where even one has more."""
    behind = np.cumsum(lengths[::-1])[::-1]
    found: npt.NDArray[np.bool_] = behind * 20 <= lengths.sum()
    if len(lengths) > 1 and not found.any():
        found[len(lengths) - 1 - lengths[::-1].argmin()] = True
    return found


def pack(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Put things into as few rows as best-fit decreasing does: the longest first, each where it leaves least room.

    That takes at most 11/9 of the fewest rows possible, and four (Johnson et al. 1974, SIAM J. Comput. 3).

    Args:
        lengths: of each, none above `capacity`.

    Returns:
        Their numbers, row by row, in their order.
    """
    rows: list[Row] = []
    room: dict[int, list[int]] = {}
    """Room that is left -> rows that have it."""
    sizes: list[int] = []
    """Rooms that some row has, in order."""
    for number in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        place = bisect_left(sizes, lengths[number])
        if place == len(sizes):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left = sizes[place]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[place]
        rows[row].append(number)
        if left := left - lengths[number]:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(row)
    return [sorted(row) for row in rows]
