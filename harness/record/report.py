"""The report of a sweep: results.csv, results.md and the table in the terminal, rebuilt from files alone."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.record import columns
from harness.record.columns import NOT_SHOWN, Column, Shown
from harness.record.rows import Row, point_row
from harness.record.sources import is_sound
from harness.record.spread import LARGE_DRIFT
from harness.record.store import UNFINISHED, Point, SweepDirectory, write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_NEAR = 4
"""Columns that are suggested for one there is not."""


def collect(sweep: SweepDirectory) -> list[Row]:
    """One row per point ever asked for, from its newest finished attempt and its repeats, in order of their names.

    Rows are stale that were measured in another environment than that of the last request; single runs make none, and
    are compared with the one that ended last.
    """
    points = sweep.points()
    reference = sweep.request().get("environment") or newest_environment(points)
    rows = [point_row(point, reference) for point in points]
    return [row for row in rows if row is not None]


def newest_environment(points: Iterable[Point]) -> Mapping[str, Any] | None:
    """Where the attempt ran that ended last, those of a later version left out; None when none has."""
    attempts = [attempt for point in points for attempt in point.attempts() if not attempt.later_version()]
    statuses = [attempt.status() for attempt in attempts]
    ended = [status for status in statuses if status.get("ended") and status.get("environment")]
    return max(ended, key=lambda status: str(status["ended"]))["environment"] if ended else None


def left_out(sweep: SweepDirectory) -> list[str]:
    """A sentence for each attempt that a later version made: what it holds is not known, so it is in no table."""
    attempts = [attempt for point in sweep.points() for attempt in point.attempts()]
    return [
        f"{attempt.path.relative_to(sweep.path)} is of a later version ({unknown}); left out"
        for attempt in attempts
        if (unknown := attempt.later_version())
    ]


RATES = ("tokens_per_second", "tokens_per_second_per_device")
"""Columns that rows are ranked by."""


def is_ranked(row: Row) -> bool:
    """Whether a row's times compare with those of others."""
    sound = row["status"] == "ok" and is_sound(row)
    known = all(row[name] for name in ("world_size", "step_seconds", *RATES))
    return known and sound and not row["oversubscribed"] and not row["stale"]


def ranking_column(rows: Iterable[Row]) -> str:
    """The column rows are ranked by: per device as soon as their world sizes differ."""
    sizes = {row["world_size"] for row in rows if is_ranked(row)}
    return "tokens_per_second_per_device" if len(sizes) > 1 else "tokens_per_second"


def rank(rows: Iterable[Row]) -> list[Row]:
    """Rows in order, each with its `rank`: those that compare, other measured ones, the rest.

    Rows whose p10-p90 ranges overlap with one above of the same rank share it: "1", "1=", "3". Rows that don't
    compare (`is_ranked`) and those without a measurement have rank "".
    """
    rows = [{**row, "rank": ""} for row in rows]
    by = ranking_column(rows)
    ranked = sorted((row for row in rows if is_ranked(row)), key=lambda row: (-row[by], row["point"]))
    number, slowest = "", math.inf  # rank of the tie above, and the lower end of its ranges
    for position, entry in enumerate(ranked, start=1):
        step_seconds = entry["step_seconds"]
        fast = entry[by] * step_seconds / (entry["step_seconds_p10"] or step_seconds)
        slow = entry[by] * step_seconds / (entry["step_seconds_p90"] or step_seconds)
        if fast >= slowest:
            entry["rank"], slowest = f"{number}=", min(slow, slowest)
        else:
            entry["rank"], slowest = str(position), slow
            number = entry["rank"]
    measured = [row for row in rows if row["status"] == "ok" and not is_ranked(row)]
    failed = [row for row in rows if row["status"] != "ok"]
    measured.sort(
        key=lambda row: (not is_sound(row), bool(row["stale"]), -(row["tokens_per_second"] or 0), row["point"])
    )
    failed.sort(key=lambda row: (row["status"], row["point"]))
    return ranked + measured + failed


def write_report(sweep: SweepDirectory) -> list[Row]:
    """Replace results.csv and results.md; the ranked rows.

    Raises:
        OSError: they can't be written.
    """
    rows = rank(collect(sweep))
    write_atomically(sweep.path / "results.csv", csv_text(rows))
    write_atomically(sweep.path / "results.md", markdown(sweep, rows))
    return rows


def csv_text(rows: Iterable[Row]) -> str:
    """All columns of all rows; empty for what is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns.names(), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


RANK = Column("rank", "", "place in the ranking", shown=Shown(("", "rank")))
"""Of the tables, not of results.csv."""


def table_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns people read, from left to right, without those that are empty or the same on every row."""
    ordered = sorted(columns.COLUMNS, key=lambda column: column.shown.place)
    shown = [RANK, *(column for column in ordered if column.shown is not NOT_SHOWN)]
    if ranking_column(rows) == "tokens_per_second":
        shown = [column for column in shown if column.name != "tokens_per_second_per_device"]

    def is_news(column: Column) -> bool:
        # Threads follow from the number of ranks: what differs with the world size alone is no news.
        alike = [tuple(row[name] for name in column.shown.among) for row in rows]
        varies = len(set(zip(alike, (row[column.name] for row in rows), strict=True))) > len(set(alike))
        return varies or not column.shown.only_varying

    return [column for column in shown if any(cell(row, column) for row in rows) and is_news(column)]


def cell(row: Row, column: Column) -> str:
    """What stands in a row of the ranked table; empty for what is not known."""
    if column is RANK:
        return (row["rank"] or "-") + ("*" if row["stale"] else "")
    ends = [row[name] for name in (column.name, column.shown.to) if name]
    return "" if None in ends else "-".join(map(column.shown.text, ends))


def layout(row: Row) -> str:
    """The layout of a row in short, as far as known; else the name of its point."""
    parts = [("tp", "tp"), ("pp", "pp"), ("dp", "dp"), ("mbs", "micro_batch_size")]
    return " ".join(f"{short}{row[key]}" for short, key in parts if row[key] is not None) or row["point"]


def headline(rows: Sequence[Row]) -> str:
    """How many points, and what became of them."""
    counts = Counter(row["status"] for row in rows)
    parts = [f"{count} {status}" for status, count in counts.most_common()]
    return f"{len(rows)} point{'s' * (len(rows) != 1)}: {', '.join(parts) or 'none yet'}"


def legend(rows: Sequence[Row]) -> list[str]:
    """Sentences that say how the table is to be read."""
    by = ranking_column(rows)
    ranked = [row for row in rows if is_ranked(row)]
    measured = [row for row in rows if row["status"] == "ok"]
    sentences = []
    if ranked:
        where = "across world sizes" if by.endswith("per_device") else f"among {ranked[0]['world_size']}-rank layouts"
        sentences.append(f"Ranked by {by} {where}, from the median step after warm-up.")
    if any(row["rank"].endswith("=") for row in ranked):
        sentences.append("= is a tie: the p10-p90 range of step times overlaps with one above of the same rank.")
    sentences += [f"{layout(row)} has no rank: {row['reason']}." for row in measured if not is_sound(row)]
    sentences += [
        f"{row['point']} has no rank: its config.yaml is missing or damaged."
        for row in measured
        if row["world_size"] is None
    ]
    if any(row["oversubscribed"] for row in measured):
        sentences.append(
            "- has no rank: more ranks x threads than cores, so its times compare with nothing but themselves."
        )
    if any((row["repeats"] or 0) > 1 for row in measured):
        sentences.append("Measured several times (results.csv: repeats): medians of the runs, p10-p90 over all steps.")
    if any((row["slots"] or 1) > 1 for row in measured):
        sentences.append(
            "Points that ran at once (results.csv: slots) shared memory bandwidth and disturbed each other; "
            "launch.slots=1 measures each alone."
        )
    if drifting := sum(abs(row["drift"] or 0) >= LARGE_DRIFT for row in measured):
        sentences.append(f"Step times of {drifting} of {len(measured)} points drifted (results.csv: drift).")
    if any(row["stale"] for row in measured):
        sentences.append(
            "* is stale and has no rank: measured with other versions, hardware or code than asked for last."
        )
    if measured:
        sentences.append("Bubble: idle share of the pipeline; ideal: of equal stages with free transfers.")
    return sentences


def markdown(sweep: SweepDirectory, rows: Sequence[Row]) -> str:
    """Text of results.md."""
    measured = [row for row in rows if row["status"] == "ok"]
    others = [row for row in rows if row["status"] != "ok"]
    lines = [f"# Sweep {_escape(sweep.name)}", "", f"{headline(rows)}.", ""]
    lines += [f"- {_escape(line)}" for line in _circumstances(sweep)] + [""]
    if measured:
        shown = table_columns(measured)
        headers = [" ".join(filter(None, column.shown.header)) for column in shown]
        cells = [[cell(row, column) for column in shown] for row in measured]
        lines += [*_markdown_table(headers, cells, align="---:"), ""]
        lines += [*(_escape(sentence) + "  " for sentence in legend(rows)), ""]
    if winner := _winner(rows):
        lines += ["## Run rank 1 again", "", *_fenced(winner["command"]), ""]
    if others:
        cells = [[layout(row), row["status"], row["reason"] or "", row["point"]] for row in others]
        lines += ["## Points without a measurement", ""]
        lines += [*_markdown_table(["layout", "status", "reason", "point"], cells, align="---"), ""]
    return "\n".join(lines)


def _circumstances(sweep: SweepDirectory) -> list[str]:
    """When, on what and with what the shown attempts were measured."""
    statuses = [attempt.status() for point in sweep.points() if (attempt := point.shown())]
    ended = sorted(status["ended"][:16].replace("T", " ") for status in statuses if status.get("ended"))
    lines = [f"Date: {' to '.join(dict.fromkeys([ended[0], ended[-1]]))} UTC"] if ended else []
    for environment in (status["environment"] for status in statuses if status.get("environment")):
        hardware, versions = environment.get("hardware") or {}, environment.get("versions") or {}
        devices = f"{hardware.get('num_devices')} x " if hardware.get("device_kind") == "cuda" else ""
        lines.append(
            f"Hardware: {devices}{hardware.get('device_name')}, {hardware.get('num_cores')} cores, "
            f"host {hardware.get('host')}"
        )
        lines.append(
            "Versions: "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f", shardwright code {environment.get('code')}"
        )
    return sorted(set(lines))


def _escape(text: str) -> str:
    """Text without a meaning in markdown, on one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _markdown_table(headers: Sequence[str], cells: Iterable[Sequence[str]], align: str) -> list[str]:
    rows = [headers, [align] * len(headers), *([_escape(cell) for cell in line] for line in cells)]
    return [f"| {' | '.join(line)} |" for line in rows]


def _fenced(text: str) -> list[str]:
    """A code block that the text can't end."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "bash", text, fence]


def print_report(rows: Sequence[Row], console: Console) -> None:
    """The ranked table in a terminal, what was not measured and why, and the command of the winner.

    Args:
        rows: as `rank` returns them.
    """
    from rich.markup import escape
    from rich.table import Table

    measured = [row for row in rows if row["status"] == "ok"]
    console.print(headline(rows), style="bold", highlight=False)
    if measured:
        console.print()
        console.print(_table(measured, console))
        for sentence in legend(rows):
            console.print(escape(sentence), style="dim", highlight=False)
    others = Table.grid(padding=(0, 2))
    for row in rows:
        if row["status"] != "ok":
            colour = "yellow" if row["status"] in UNFINISHED | {"invalid"} else "red"
            reason = " ".join((row["reason"] or "").split())
            others.add_row(f"[{colour}]{row['status']}[/]", escape(layout(row)), escape(reason))
    if others.rows:
        console.print()
        console.print(others, highlight=False)
    if winner := _winner(rows):
        ties = sum(row["rank"] in ("1", "1=") for row in rows)
        tie = f" (a tie of {ties})" if ties > 1 else ""
        console.print(f"\nRank 1{tie}, {escape(layout(winner))}, is run again by", style="bold", highlight=False)
        console.print(winner["command"], markup=False, highlight=False, soft_wrap=True, style="green")


def _winner(rows: Sequence[Row]) -> Row | None:
    """The first row, when it has a rank and its command is known."""
    return next((row for row in rows if row["rank"] == "1" and row["command"]), None)


def _table(rows: Sequence[Row], console: Console) -> Table:
    """The table with as many columns as fit."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = table_columns(rows)
    while True:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
        for column in shown:
            table.add_column("\n".join(column.shown.header), justify="right", no_wrap=True)
        for row in rows:
            style = "bold green" if row["rank"] in ("1", "1=") else "" if row["rank"] else "dim"
            table.add_row(*(escape(cell(row, column)) for column in shown), style=style)
        least = max(shown, key=lambda column: column.shown.dispensable)
        width = console.measure(table, options=console.options.update(max_width=1000)).maximum
        if not least.shown.dispensable or width <= console.width:
            return table
        shown.remove(least)


def columns_named(text: str) -> list[str]:
    """Names of columns of results.csv, separated by commas.

    Raises:
        ConfigError: there is no such column; it says which are near.
    """
    known = columns.names()
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in known:
            holding = [other for other in known if name and name.lower() in other]
            near = ", ".join(list(dict.fromkeys([*holding, *get_close_matches(name.lower(), known)]))[:MOST_NEAR])
            raise ConfigError(f"no column {name!r}; {f'near: {near}' if near else 'results/README.md lists them all'}")
    return wanted


def print_columns(rows: Sequence[Row], wanted: Sequence[str], console: Console) -> None:
    """Some columns of all rows in a terminal, with the values that results.csv has.

    Args:
        rows: as `rank` returns them.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
    for name in wanted:
        is_text = any(isinstance(row[name], str) for row in rows)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if row[name] is None else escape(str(row[name])) for name in wanted))
    console.print(table)
