"""The rows of results.csv: all columns of an attempt, and of a point over its repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from harness.machine import Machine
from harness.record import columns
from harness.record.inference import MeasuredInference, inference_record_of
from harness.record.sources import MeasuredRun, Tried, is_oversubscribed
from harness.record.steps import record_of, timed_seconds
from harness.record.store import Attempt, Point, read_json, read_jsonl, read_measured
from harness.spec.config import RunConfig
from harness.spec.identity import NOT_COMPUTED

Row = dict[str, Any]
"""Name of a column -> value; None for what is not known."""
_NUMBER = (int, float, type(None))


def row(attempt: Attempt, reference: Mapping[str, Any] | None = None) -> Row:
    """All columns of an attempt, whatever became of it.

    Args:
        reference: the environment of now; an attempt measured in another one is stale.
    """
    status, result = attempt.status(), attempt.result() or {}
    tried = Tried(attempt, status, read_measured(attempt.parity_file) or {}, reference, result)
    found: Row = dict.fromkeys(columns.names()) | columns.attempt_columns(tried)
    try:
        config = attempt.config()
        found |= columns.layout_columns(config)
    except ValueError:  # refused, damaged
        found |= columns.layout_columns(attempt.raw_config())
    else:
        if machine := _machine((status.get("environment") or {}).get("hardware")):
            found["oversubscribed"] = is_oversubscribed(config, machine)
        if "row" not in result:
            found |= _before_the_end(attempt, config, machine)
    measured = result.get("row")
    measured = measured if isinstance(measured, Mapping) else {}
    values = [measured.get(column.name) for column in columns.COLUMNS if column.measured or column.inferred]
    if not all(isinstance(value, _NUMBER) for value in values):
        return found | {"status": "crashed", "reason": "result.json is damaged: its row holds what is no number"}
    return found | {key: measured[key] for key in found if key in measured}


def _before_the_end(attempt: Attempt, config: RunConfig, machine: Machine | None) -> Row:
    """Columns that a run measured before it failed: of training loss and memory from its first step on, then times."""
    lines = read_jsonl(attempt.metrics_file)
    try:
        if config.task == "train":
            found = columns.measured_columns(MeasuredRun(config, [*map(record_of, lines)], machine))
        else:
            counting = lines[config.train.warmup_steps :] if config.task == "forward" else lines
            records = [*map(inference_record_of, counting)]
            found = columns.inferred_columns(MeasuredInference(config, records, machine))
    except (KeyError, TypeError, ZeroDivisionError):  # not a file of ours
        return {}
    errors = [read_json(path) or {} for path in attempt.error_file(0).parent.glob("*.json")]
    peaks = [found.get("peak_memory_bytes"), *(error.get("peak_memory_bytes") for error in errors)]
    return found | {"peak_memory_bytes": max((peak for peak in peaks if isinstance(peak, int)), default=None)}


def _machine(hardware: Any) -> Machine | None:
    """The machine of a status file, None when it doesn't say."""
    try:
        return Machine(**{field.name: hardware[field.name] for field in fields(Machine) if field.default is MISSING})
    except (KeyError, TypeError):
        return None


def point_row(point: Point, reference: Mapping[str, Any] | None = None) -> Row | None:
    """All columns of a point: of its newest finished attempt and, where that is ok, over all its repeats.

    Args:
        reference: as for `row`.

    Returns:
        None for a point without attempts, or with none but those of a later version.
    """
    shown = point.shown()
    if shown is None:
        return None
    found = row(shown, reference)
    repeats = point.measured_in(shown.status().get("environment") or {})
    return _combined(repeats, reference) if found["status"] == "ok" and len(repeats) > 1 else found


def _combined(repeats: Sequence[Attempt], reference: Mapping[str, Any] | None) -> Row:
    """One row for several measurements of a point, oldest first."""
    rows = [row(repeat, reference) for repeat in repeats]
    found = {column.name: column.repeats([row[column.name] for row in rows]) for column in columns.COLUMNS}
    if checked := [row for row in rows if row["parity"]]:  # repeats are one layout: the last verdict is that of all
        found |= {key: checked[-1][key] for key in ("parity", "parity_max_error", "reason")}
    if seconds := [value for repeat in repeats for value in timed_seconds(repeat)]:
        known = [column for column in columns.COLUMNS if found[column.name] is not None]
        found |= {column.name: column.of_all_steps(seconds) for column in known if column.of_all_steps}
    return found


def compare(points: Sequence[Point], rows: Sequence[Row]) -> None:
    """Fill in what compares a run without training with the one of one rank that has the same settings.

    Args:
        points: those of the rows.
        rows: of one sweep; those that are stale or have failed compare with nothing.
    """
    alike: dict[str, list[Row]] = {}
    for point, found in zip(points, rows, strict=True):
        if found["status"] == "ok" and not found["stale"] and (settings := _settings(point)):
            alike.setdefault(settings, []).append(found)
    for those in alike.values():
        one = next((found for found in those if found["world_size"] == 1), None)
        if one is not None:
            for found in those:
                found |= columns.compared_columns(found, one)


def _settings(point: Point) -> str | None:
    """Everything that a run without training depends on but its layout; None where that says little about its speed.

    Threads per rank are of it on CPU, where they share the cores with other ranks. An offered rate of requests bounds
    the throughput, whatever the layout.
    """
    shown = point.shown()
    try:
        config = None if shown is None else shown.config()
    except ValueError:
        return None
    if shown is None or config is None or config.task == "train" or config.generate.request_rate is not None:
        return None
    hardware = (shown.status().get("environment") or {}).get("hardware") or {}
    settings = config.model_dump(mode="json", exclude=dict.fromkeys(("parallel", *NOT_COMPUTED), True))
    threads = None if hardware.get("device_kind") == "cuda" else config.launch.threads_per_rank
    return json.dumps([settings, threads, config.launch.slots], sort_keys=True)
