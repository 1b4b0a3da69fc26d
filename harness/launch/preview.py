"""What a sweep is going to do, before it does it: which points run, which don't, why, and how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.launch.points import Decision
from harness.record.store import SweepDirectory


def expected_seconds(decisions: Sequence[Decision], sweep: SweepDirectory) -> float | None:
    """Time of the new runs one after the other, from that of the sweep's measured ones; None without any."""
    statuses = [attempt.status() for point in sweep.points() for attempt in point.attempts()]
    measured = [_seconds(status) for status in statuses if status["status"] == "ok" and "ended" in status]
    return fmean(measured) * sum(decision.num_runs for decision in decisions) if measured else None


def _seconds(status: Mapping[str, Any]) -> float:
    started, ended = (datetime.fromisoformat(status[key]) for key in ("started", "ended"))
    return max(0.0, (ended - started).total_seconds())


def print_preview(decisions: Sequence[Decision], num_points: int, sweep: SweepDirectory, console: Console) -> None:
    """How many points run, are reused, are kept as failed or are invalid, each with its reason, and how long it takes.

    Args:
        num_points: asked for, those that are the same included.
    """
    actions = Counter(decision.action for decision in decisions)
    num_runs = sum(decision.num_runs for decision in decisions)
    times = f" ({num_runs} runs)" if num_runs > actions["run"] else ""
    kept = f", {actions['keep']} failed before" if actions["keep"] else ""
    console.print(
        f"{num_points} points: {actions['run']} to run{times}, {actions['reuse']} reused{kept}, "
        f"{actions['invalid']} can't run"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    table.add_column("points", justify="right")
    table.add_column("")
    table.add_column("why")
    order = ("run", "reuse", "keep", "invalid")
    counts = Counter((decision.action, decision.why) for decision in decisions)
    for (action, why), count in sorted(counts.items(), key=lambda item: (order.index(item[0][0]), -item[1])):
        table.add_row(str(count), action, Text(why))
    console.print(table)
    if (seconds := expected_seconds(decisions, sweep)) is not None:
        console.print(f"Expected: about {f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'}.")
