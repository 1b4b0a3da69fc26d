"""launchers/report.py: the report of a sweep, rebuilt from its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.analyse.finish import finish, print_warnings, replay
from harness.errors import ConfigError
from harness.record.report import collect, columns_named, left_out, print_columns, print_report, rank, write_report
from harness.record.store import SweepDirectory


def main(arguments: Sequence[str]) -> int:
    """`report.py results/NAME [--columns A,B,C] [--wandb]`; the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", add_help=False)  # the launcher's docstring is its help
    parser.add_argument("sweep", type=Path, metavar="results/NAME")
    parser.add_argument("--columns", metavar="A,B,C")
    parser.add_argument("--wandb", action="store_true")
    options = parser.parse_args(arguments)
    folder = options.sweep.resolve()
    if not (folder / "points").is_dir():
        print(f"{options.sweep} is not a folder of results (it has no points/); give results/NAME", file=sys.stderr)
        return 2
    try:
        wanted = None if options.columns is None else columns_named(options.columns)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sweep = SweepDirectory(folder.parent, folder.name)
    warnings = _mirror_attempts(sweep) if options.wandb else []
    try:
        rows = write_report(sweep)
    except OSError as error:
        warnings.append(f"results.csv and results.md are not written: {error}")
        rows = rank(collect(sweep))
    else:
        warnings += finish([replay([sweep.path])], 60) if options.wandb else []
    console = Console(width=None if sys.stdout.isatty() else 100)
    if wanted is None:
        print_report(rows, console)
    else:
        print_columns(rows, wanted, console)
    print_warnings([*left_out(sweep), *warnings])
    return 1 if warnings else 0


def _mirror_attempts(sweep: SweepDirectory) -> list[str]:
    """Write the ended attempts that wandb does not have; warnings."""
    attempts = [attempt for point in sweep.points() for attempt in point.attempts()]
    ended = [a for a in attempts if a.status()["status"] not in ("pending", "running") and not a.later_version()]
    missing = [attempt.path for attempt in ended if not attempt.wandb_run_id()]
    return finish([replay(missing)], 60 + 10 * len(missing)) if missing else []
