"""The one table of columns: what follows from an entry, the README's copy of it, and rows of runs published earlier."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from examples.metric import COLUMN
from helpers import MACHINE, record_attempt

from harness.record import columns, mirror
from harness.record.columns import Column, names, readme_table
from harness.record.report import csv_text, rank, write_report
from harness.record.rows import row
from harness.record.store import Attempt, SweepDirectory, environment
from harness.spec.config import REPOSITORY

PUBLISHED = sorted(file.parent for file in (REPOSITORY / "results/published").glob("**/results.csv"))
RUNS = sorted((REPOSITORY / "results/published").glob("**/result.json"))


def readme_agrees() -> bool:
    return f"\n\n{readme_table()}\n\n" in (REPOSITORY / "results/README.md").read_text()


def test_the_readme_tells_what_each_column_means() -> None:
    assert readme_agrees(), "put what `python -m harness.record.columns` prints into results/README.md"


@pytest.mark.parametrize("column", columns.COLUMNS, ids=names())
def test_an_entry_is_whole(column: Column) -> None:
    of_runs = column.measured or column.inferred
    assert sum(source is not None for source in (column.layout, of_runs, column.attempt, column.compared)) == 1
    assert column.meaning
    assert "|" not in column.meaning
    assert "\n" not in column.meaning
    assert column.shown.to in ("", *names())


class Summary(dict[str, Any]):
    """Stands in for a wandb run."""

    def __init__(self) -> None:
        self.summary, self.config, self.tags, self.id = dict[str, Any](), dict[str, Any](), (), "x"
        self.define_metric = self.log = self.finish = lambda *_, **__: None


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a sweep of one point, measured twice, leaves: the header and cells of results.csv, results.md, a summary."""
    sweep, run = SweepDirectory(folder, "grid"), Summary()
    sweep.prepare({"environment": environment(MACHINE)})
    for seconds in ([9.0, 9.0, 0.1, 0.3], [9.0, 9.0, 0.2, 0.25]):
        attempt = record_attempt(sweep, step_seconds=seconds)

    @contextmanager
    def open_run(*_: Any, **__: Any) -> Iterator[Summary]:
        yield run

    monkeypatch.setattr(mirror, "_open_run", open_run)
    mirror.mirror(attempt)
    write_report(sweep)
    cells = next(csv.DictReader((sweep.path / "results.csv").open()))
    return SimpleNamespace(cells=cells, markdown=(sweep.path / "results.md").read_text(), summary=run.summary)


def test_a_metric_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in results.csv, results.md, wandb and the README's table, and without it nothing of it is anywhere."""
    with monkeypatch.context() as patch:
        patch.setattr(columns, "COLUMNS", (*columns.COLUMNS, COLUMN))
        found = written(tmp_path / "with", patch)
        assert list(found.cells) == names()
        assert found.cells[COLUMN.name] == "0.3"
        assert "| slowest ms |" in found.markdown
        assert "| 300 |" in found.markdown
        assert found.summary[COLUMN.name] == 0.25  # of the second attempt
        assert f"| `{COLUMN.name}` | s | the slowest step after warm-up" in readme_table()
        assert not readme_agrees()
    without = written(tmp_path / "without", monkeypatch)
    assert COLUMN.name not in [*without.cells, *without.summary]
    assert "slowest" not in without.markdown + readme_table()
    read_later = row(SweepDirectory(tmp_path / "with", "grid").points()[0].attempts()[0])
    assert COLUMN.name not in read_later


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.parent.relative_to(REPOSITORY / "results/published")))
def test_a_run_published_earlier_has_the_row_it_had(file: Path, tmp_path: Path) -> None:
    """From its configuration, result and command; the rest of a published folder is of the sweep."""
    campaign = next(folder for folder in PUBLISHED if file.is_relative_to(folder))
    attempt = Attempt(tmp_path / "grid" / "points" / "point" / "attempt-1")
    attempt.path.mkdir(parents=True)
    for name in ("config.yaml", "result.json", "command.txt"):
        shutil.copy(file.parent / name, attempt.path)
    attempt.write_status("ok", environment=yaml.safe_load((campaign / "sweep.yaml").read_text())["environment"])
    found = row(attempt)
    assert {key: found[key] for key in (attempt.result() or {})["row"]} == (attempt.result() or {})["row"]
    shown = next(csv.DictReader(io.StringIO(csv_text([found]))))
    for then in csv.DictReader((campaign / "results.csv").open()):
        if then["command"] == attempt.command():
            assert {key: shown[key] for key in then} == then | {"point": "point", "wandb_run_id": "", "stale": ""}


def test_some_runs_are_published() -> None:
    assert len(RUNS) >= 3


@pytest.mark.parametrize(
    "campaign", PUBLISHED, ids=lambda folder: str(folder.relative_to(REPOSITORY / "results/published"))
)
def test_published_rows_are_ranked_as_they_were(campaign: Path) -> None:
    measured = {column.name for column in columns.COLUMNS if column.measured or column.inferred or column.compared}
    numbers = measured | {"request_rate", "world_size", "tp", "pp"}

    def value(key: str, text: str) -> Any:
        known = {"": None, "True": True, "False": False}
        return known[text] if text in known else float(text) if key in numbers else text

    with (campaign / "results.csv").open() as file:
        rows = [{key: value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
    assert [entry["point"] for entry in rank(reversed(rows))] == [entry["point"] for entry in rows]
    assert set(rows[0]) <= set(names())
