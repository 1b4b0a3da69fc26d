"""Schedules in files, as torch.distributed.pipelining writes and reads them: a row per stage, a cell per pass.

    0F0,0F1,0F2,,0I0,0W0,...
    1F0,,1F1,1I0,...

A cell is the model's part, the pass and the micro-batch. F is a forward pass, B a whole backward pass, I and W are its
halves (input and weights). Empty cells are idle time, which follows by itself; transfers, reductions and gathers of
parameters follow, too, and are passed over; `(0F1;3B0)OVERLAP_F_B` are two passes one after the other.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.errors import ConfigError

KIND_OF_LETTER = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
LETTER_OF_KIND = {kind: letter for letter, kind in KIND_OF_LETTER.items()}
PASS = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
FOLLOWS = re.compile(r"[0-9]*(UNSHARD|RESHARD|REDUCE_GRAD|SEND_[FB]|RECV_[FB])[0-9]*")
"""What is not for a schedule to say here."""


def read_schedule(path: Path) -> list[str]:
    """The passes of every stage, cells separated by spaces.

    Raises:
        ConfigError: the file can't be read, or has a cell that is no pass.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [list(row) for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"parallel.schedule={str(path)!r} can't be read: {error}; name a schedule or a file, or give "
            "parallel.schedule_passes what config.yaml of a run of it holds"
        ) from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise ConfigError(f"parallel.schedule={str(path)!r} is empty; give a row of passes per stage, such as 0F0,0B0")
    return [" ".join(_cells(row, path, number)) for number, row in enumerate(rows, start=1)]


def _cells(row: Iterable[str], path: Path, number: int) -> Iterator[str]:
    for cell in (cell.strip() for cell in row):
        if match := OVERLAPPED.fullmatch(cell):
            yield from _cells(match[1].split(";"), path, number)
        elif PASS.fullmatch(cell):
            yield cell
        elif cell and not FOLLOWS.fullmatch(cell):
            raise ConfigError(
                f"parallel.schedule={str(path)!r} has {cell[:40]!r} in row {number}, which is no pass; write part, "
                "F, B, I or W, and micro-batch, such as 0F0"
            )


def passes_of(row: str) -> list[tuple[str, int, int]]:
    """Kind, micro-batch and part of every pass of a stage.

    Args:
        row: as `read_schedule` has it.

    Raises:
        ValueError: a word is no pass.
    """
    found = []
    for word in row.split():
        if not (match := PASS.fullmatch(word)):
            raise ValueError(f"{word[:40]!r} is no pass; write part, F, B, I or W, and micro-batch, such as 0F0")
        part, letter, micro_batch = match.groups()
        found.append((KIND_OF_LETTER[letter], int(micro_batch), int(part)))
    return found


def write_schedule(path: Path, stages: Sequence[Iterable[tuple[str, int, int]]]) -> None:
    """Write the passes of every stage: kind, micro-batch and part of each."""
    with path.open("w", newline="") as file:
        for passes in stages:
            csv.writer(file).writerow(f"{part}{LETTER_OF_KIND[kind]}{number}" for kind, number, part in passes)
