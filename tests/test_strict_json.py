"""JSON that any parser reads, whatever was measured."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import MACHINE, record_attempt, step_records
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.record.columns import measured_columns
from harness.record.report import csv_text, markdown, rank
from harness.record.rows import row
from harness.record.sources import MeasuredRun
from harness.record.steps import metrics_line
from harness.record.store import SweepDirectory, read_jsonl, read_measured, write_json
from harness.strict_json import dumps, with_numbers

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet="ab\u00e9\n", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def strictly(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(value=VALUES)
@settings(deadline=None)
def test_what_is_written_is_json_and_is_read_back(value: Any) -> None:
    assert repr(with_numbers(strictly(dumps(value)))) == repr(value)


def test_numbers_that_are_none_have_names() -> None:
    value = {"a": (1.0, math.nan), "b": [math.inf, {"c": -math.inf}]}
    assert strictly(dumps(value)) == {"a": [1.0, "NaN"], "b": ["Infinity", {"c": "-Infinity"}]}


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1000.0])
def test_a_run_that_diverged_is_measured_and_shows_it(tmp_path: Path, loss: float) -> None:
    sweep = SweepDirectory(tmp_path, "s")
    attempt = record_attempt(sweep, "train.eval_interval=2")
    config = attempt.config()
    records = step_records([0.1] * 5)
    records[-1] = type(records[-1])(**{**vars(records[-1]), "loss": loss, "grad_norm": math.nan, "eval_loss": loss})
    attempt.metrics_file.write_text("".join(dumps(metrics_line(record, config)) + "\n" for record in records))
    columns = measured_columns(MeasuredRun(config, records, MACHINE))
    write_json(attempt.result_file, {"row": columns})

    last = strictly(attempt.metrics_file.read_text().splitlines()[-1])
    assert last["train/loss"] == {math.inf: "Infinity", 1000.0: 1000.0}.get(loss, "NaN")
    assert repr(read_jsonl(attempt.metrics_file)[-1]["train/loss"]) == repr(loss)
    strictly(attempt.result_file.read_text())
    assert repr((read_measured(attempt.result_file) or {})["row"]["last_loss"]) == repr(loss)

    for kept in (True, False):  # a finished run, and one that was cut off
        if not kept:
            attempt.result_file.unlink()
            attempt.write_status("crashed", "cut off")
        rows = rank([row(attempt)])
        assert repr(rows[0]["last_loss"]) == repr(loss)
        shown = next(csv.DictReader(io.StringIO(csv_text(rows))))
        assert shown["last_loss"] == repr(loss)
        assert shown["eval_perplexity"] == ("nan" if math.isnan(loss) else "inf")
        assert markdown(sweep, rows).startswith("# Sweep s")
