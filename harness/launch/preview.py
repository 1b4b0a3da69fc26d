"""What a sweep is going to do, before it does it: which points run, which don't, why, and how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.record.store import Attempt, Point, SweepDirectory, is_stale
from harness.spec.config import RunConfig


@dataclass(frozen=True)
class Decision:
    """What becomes of a point that was asked for."""

    action: Literal["run", "reuse", "keep", "invalid"]
    """keep: it failed, and is not tried again."""
    why: str
    attempts: list[Attempt] = field(default_factory=list)
    """Earlier ones that count."""
    num_runs: int = 0
    """New ones it takes."""


def decide(config: RunConfig, point: Point, now: Mapping[str, Any]) -> Decision:
    """What becomes of a point that can run.

    Args:
        now: the environment; what was measured in another one is run again.
    """
    repeats, newest = config.sweep.repeats, point.newest_finished()
    if newest is None:
        return Decision("run", "interrupted before" if point.attempts() else "not measured yet", num_runs=repeats)
    content = newest.status()
    status = content["status"]
    if is_stale(content.get("environment") or {}, now):
        return Decision("run", "stale: measured with other versions, hardware or code", num_runs=repeats)
    if status != "ok" and status not in config.sweep.retry:
        return Decision("keep", f"{status} before; sweep.retry=[{status}] runs it again", [newest])
    measured = point.measured_in(now)
    if missing := max(repeats - len(measured), int(status != "ok")):
        why = "not measured often enough" if status == "ok" else f"{status} before, and in sweep.retry"
        return Decision("run", why, measured, missing)
    return Decision("reuse", "measured already", measured)


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
