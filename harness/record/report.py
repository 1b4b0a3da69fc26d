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
from harness.record.columns import COMPARED, LAYOUT, MODEL, NOT_SHOWN, SETTING, Column, Shown
from harness.record.rows import Row, compare, point_row
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
    found = [(point, row) for point in points if (row := point_row(point, reference)) is not None]
    rows = [row for _, row in found]
    compare([point for point, _ in found], rows)
    return rows


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
    known = all(row[name] for name in ("world_size", _seconds(row), *RATES))
    return known and is_comparable(row) and not has_rate(row)


def is_comparable(row: Row) -> bool:
    """Whether a row was measured well, and with what and on what the others were."""
    return row["status"] == "ok" and is_sound(row) and not row["oversubscribed"] and not row["stale"]


def has_rate(row: Row) -> bool:
    """Whether requests were offered at a rate, which bounds its throughput: then it is a point of a curve."""
    return row.get("request_rate") is not None


def _seconds(row: Row) -> str:
    """The column whose range says how exact a row's rates are."""
    return "generation_seconds" if row.get("task") == "generate" else "step_seconds"


def rankings(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that compete with each other, by (task, part of the model): what they measured is the same."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in filter(is_ranked, rows):
        found.setdefault((row.get("task") or "train", row.get("part") or "model"), []).append(row)
    return dict(sorted(found.items()))


def ranking_column(rows: Iterable[Row]) -> str:
    """The column that rows are ranked by which compete: per device as soon as their world sizes differ."""
    sizes = {row["world_size"] for row in rows if is_ranked(row)}
    return "tokens_per_second_per_device" if len(sizes) > 1 else "tokens_per_second"


def rank(rows: Iterable[Row]) -> list[Row]:
    """Rows in order, each with its `rank`: those that compare, curves over rates, other measured ones, the rest.

    Each of the `rankings` begins with 1. Rows whose p10-p90 ranges overlap with one above of the same rank share it:
    "1", "1=", "3". Rows that don't compare (`is_ranked`) and those without a measurement have rank "".
    """
    rows = [{**row, "rank": ""} for row in rows]
    ranked = [row for competing in rankings(rows).values() for row in _ranked(competing)]
    measured = [row for row in rows if row["status"] == "ok" and not is_ranked(row)]
    curves = [row for row in measured if has_rate(row) and is_comparable(row)]
    others = [row for row in measured if row not in curves]
    failed = [row for row in rows if row["status"] != "ok"]
    # A curve for each layout.
    curves.sort(key=lambda row: (row["world_size"], row["tp"], row["batch_size"], row["request_rate"], row["point"]))
    others.sort(key=lambda row: (not is_sound(row), bool(row["stale"]), -(row["tokens_per_second"] or 0), row["point"]))
    failed.sort(key=lambda row: (row["status"], row["point"]))
    return ranked + curves + others + failed


def _ranked(competing: Iterable[Row]) -> list[Row]:
    """Rows of one ranking in order, with their ranks."""
    by = ranking_column(competing := list(competing))
    competing.sort(key=lambda row: (-row[by], row["point"]))
    number, slowest = "", math.inf  # rank of the tie above, and the lower end of its ranges
    for position, entry in enumerate(competing, start=1):
        name = _seconds(entry)
        fast = entry[by] * entry[name] / (entry[f"{name}_p10"] or entry[name])
        slow = entry[by] * entry[name] / (entry[f"{name}_p90"] or entry[name])
        if fast >= slowest:
            entry["rank"], slowest = f"{number}=", min(slow, slowest)
        else:
            entry["rank"], slowest = str(position), slow
            number = entry["rank"]
    return competing


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


RANKS = Column("world_size", "", "ranks", shown=Shown(("", "ranks")))
OVERSUBSCRIBED = Column(
    "oversubscribed", "", "", shown=Shown(("shared", "cores"), lambda value: "yes" if value else "")
)
"""Of the table of speed-ups."""


def table_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns people read, from left to right, without those that are empty or the same on every row."""
    ordered = sorted(columns.COLUMNS, key=lambda column: column.shown.place)
    shown = [column for column in ordered if column.shown is not NOT_SHOWN and column.shown.place != COMPARED]
    if all(ranking_column(competing) == "tokens_per_second" for competing in rankings(rows).values()):
        shown = [column for column in shown if column.name != "tokens_per_second_per_device"]
    return _with_news([RANK, *shown], rows)


def speedup_columns(rows: Sequence[Row]) -> list[Column]:
    """Those of the table of speed-ups: what differs, the layout, and what is compared."""
    places = (MODEL, SETTING, LAYOUT)
    ordered = sorted(columns.COLUMNS, key=lambda column: (column.shown.place not in places, column.shown.place))
    layout = [column for column in ordered if column.shown.place in places and column.shown is not NOT_SHOWN]
    compared = [column for column in ordered if column.shown.place == COMPARED or column.name == "tokens_per_second"]
    return _with_news([RANKS, *layout, *compared, OVERSUBSCRIBED], rows)


def _with_news(shown: Iterable[Column], rows: Sequence[Row]) -> list[Column]:
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
    parts = [("tp", "tp"), ("pp", "pp"), ("dp", "dp"), ("mbs", "micro_batch_size"), ("batch", "batch_size")]
    return " ".join(f"{short}{row[key]}" for short, key in parts if row[key] is not None) or row["point"]


def speedups(rows: Iterable[Row]) -> list[Row]:
    """Rows that were compared with one rank, where there are others than that: by settings, then number of ranks."""
    compared = [row for row in rows if row["speedup"] is not None]
    settings = ("task", "part", "model", "quantization", "batch_size", "micro_batch_size", "max_new_tokens")
    compared.sort(key=lambda row: ([str(row[name]) for name in settings], row["world_size"], row["tp"]))
    return compared if any(row["world_size"] > 1 for row in compared) else []


def _compares(row: Row) -> bool:
    """Whether there would be a speed-up, were there a row of one rank with the same settings."""
    return row.get("task") in ("generate", "forward") and not row["stale"] and not has_rate(row)


def speedup_legend(rows: Iterable[Row]) -> list[str]:
    """Sentences that say how the table of speed-ups is to be read."""
    sentences = [
        "x: times as fast as one rank with the same settings, of latencies times as soon. Efficiency: x of all "
        "tokens/s over ranks, so 75 % on four ranks is three times as fast."
    ]
    if any(row["oversubscribed"] for row in rows):
        sentences.append("Shared cores: oversubscribed, so it shows what this machine does, not the layout.")
    return sentences


def headline(rows: Sequence[Row]) -> str:
    """How many points, and what became of them."""
    counts = Counter(row["status"] for row in rows)
    parts = [f"{count} {status}" for status, count in counts.most_common()]
    return f"{len(rows)} point{'s' * (len(rows) != 1)}: {', '.join(parts) or 'none yet'}"


def legend(rows: Sequence[Row]) -> list[str]:
    """Sentences that say how the table is to be read."""
    ranked = [row for row in rows if is_ranked(row)]
    measured = [row for row in rows if row["status"] == "ok"]
    sentences = _ranked_by(rows)
    if any(row["rank"].endswith("=") for row in ranked):
        whose = "step times" if all(_seconds(row) == "step_seconds" for row in ranked) else "their times"
        sentences.append(f"= is a tie: the p10-p90 range of {whose} overlaps with one above of the same rank.")
    if any(has_rate(row) for row in measured):
        sentences.append(
            "Rows with requests/s have no rank, as what is offered bounds their tokens/s: by layout, then rate, they "
            "are curves of latency over load."
        )
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
        what = "measurements" if all(row.get("task") == "generate" for row in measured) else "steps"
        sentences.append(
            f"Measured several times (results.csv: repeats): medians of the runs, p10-p90 over all {what}."
        )
    if any((row["slots"] or 1) > 1 for row in measured):
        sentences.append(
            "Points that ran at once (results.csv: slots) shared memory bandwidth and disturbed each other; "
            "launch.slots=1 measures each alone."
        )
    if drifting := sum(abs(row["drift"] or 0) >= LARGE_DRIFT for row in measured):
        sentences.append(f"Step times of {drifting} of {len(measured)} points drifted (results.csv: drift).")
    alone = [row for row in measured if _compares(row) and row["speedup"] is None]
    if alone and any(row["world_size"] == 1 for row in measured if _compares(row)):
        sentences.append(
            f"{len(alone)} of {len(measured)} points have no speed-up: no row of one rank has the same settings; on "
            "CPU threads per rank are of them (launch.threads_per_rank=1)."
        )
    if any(row["stale"] for row in measured):
        sentences.append(
            "* is stale and has no rank: measured with other versions, hardware or code than asked for last."
        )
    if measured:
        sentences.append("Bubble: idle share of the pipeline; ideal: of equal stages with free transfers.")
    return sentences


MEDIAN_OF = {
    "train": "step after warm-up",
    "forward": "forward pass after warm-up",
    "generate": "measurement of generate.repeats",
}


def _ranked_by(rows: Sequence[Row]) -> list[str]:
    """A sentence for each ranking: by what, among which rows."""
    found = rankings(rows)
    sentences = ["Tasks and parts of the model are ranked apart."] if len(found) > 1 else []
    for (task, part), competing in found.items():
        by, whose = (
            ranking_column(competing),
            f"task={task} model.part={part} is ranked" if len(found) > 1 else "Ranked",
        )
        size = competing[0]["world_size"]
        where = "across world sizes" if by.endswith("per_device") else f"among {size}-rank layouts"
        sentences.append(f"{whose} by {by} {where}, from the median {MEDIAN_OF[task]}.")
    return sentences


def markdown(sweep: SweepDirectory, rows: Sequence[Row]) -> str:
    """Text of results.md."""
    measured = [row for row in rows if row["status"] == "ok"]
    others = [row for row in rows if row["status"] != "ok"]
    lines = [f"# Sweep {_escape(sweep.name)}", "", f"{headline(rows)}.", ""]
    lines += [f"- {_escape(line)}" for line in _circumstances(sweep)] + [""]
    if measured:
        lines += [*_markdown_of(measured, table_columns(measured)), ""]
        lines += [*(_escape(sentence) + "  " for sentence in legend(rows)), ""]
    if compared := speedups(rows):
        lines += ["## Speed-up over one rank", "", *_markdown_of(compared, speedup_columns(compared)), ""]
        lines += [*(_escape(sentence) + "  " for sentence in speedup_legend(compared)), ""]
    if winners := _winners(rows):
        lines += ["## Run rank 1 again", "", *(line for row in winners for line in [*_fenced(row["command"]), ""])]
    if others:
        cells = [[layout(row), row["status"], row["reason"] or "", row["point"]] for row in others]
        lines += ["## Points without a measurement", ""]
        lines += [*_markdown_table(["layout", "status", "reason", "point"], cells, align="---"), ""]
    return "\n".join(lines)


def _markdown_of(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    headers = [" ".join(filter(None, column.shown.header)) for column in shown]
    return _markdown_table(headers, [[cell(row, column) for column in shown] for row in rows], align="---:")


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
        console.print(_table(measured, table_columns(measured), console))
        for sentence in legend(rows):
            console.print(escape(sentence), style="dim", highlight=False)
    if compared := speedups(rows):
        console.print("\nSpeed-up over one rank", style="bold", highlight=False)
        console.print(_table(compared, speedup_columns(compared), console))
        for sentence in speedup_legend(compared):
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
    for winner in _winners(rows):
        competing = next(ranking for ranking in rankings(rows).values() if winner in ranking)
        ties = sum(row["rank"] in ("1", "1=") for row in competing)
        tie = f" (a tie of {ties})" if ties > 1 else ""
        console.print(f"\nRank 1{tie}, {escape(layout(winner))}, is run again by", style="bold", highlight=False)
        console.print(winner["command"], markup=False, highlight=False, soft_wrap=True, style="green")


def _winners(rows: Sequence[Row]) -> list[Row]:
    """The first row of each ranking, where its command is known."""
    return [row for row in rows if row["rank"] == "1" and row["command"]]


def _table(rows: Sequence[Row], shown: list[Column], console: Console) -> Table:
    """The table with as many columns as fit."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

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
