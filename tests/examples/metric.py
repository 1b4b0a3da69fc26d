"""The example of docs/add-a-metric.md: this one entry of `COLUMNS` in harness/record/columns.py is a whole metric."""

from harness.record.columns import Column, Shown, largest, scaled

COLUMN = Column(
    "slowest_step_seconds",
    "s",
    "the slowest step after warm-up; of a point measured several times the slowest of all",
    measured=lambda run: max(run.seconds),
    repeats=largest,
    shown=Shown(("slowest", "ms"), scaled(1e3)),
)
