"""Rank program: as `ranks_curves`, with the schedule of tests/examples in the table."""

from __future__ import annotations

from pathlib import Path

import ranks_curves
from examples.schedule import SCHEDULE

from harness.spec.schedules import SCHEDULES


def run(argument: list[list[str]], folder: Path) -> list[list[float]]:
    SCHEDULES["one_by_one"] = SCHEDULE
    return ranks_curves.run(argument, folder)
