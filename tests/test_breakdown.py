"""From the span files of a run to its accounting, bubble, pictures and trace; also from what a killed run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from distributed import run_ranks
from helpers import make_config, record_attempt

from harness.analyse import finish
from harness.analyse.breakdown import (
    _mean_accounting,
    _spread,
    breakdown,
    read_run,
)
from harness.analyse.finish import Finishing, start_pictures, write_pictures
from harness.errors import ConfigError
from harness.plan.simulate import simulate
from harness.record.store import Attempt, SweepDirectory, read_json
from harness.record.summary import bubble_lines
from harness.spans.accounting import PARTS, Accounting
from harness.spans.clock import ClockOffset
from harness.spans.files import SpanWriter
from harness.spans.perfetto import trace_problems
from harness.spans.span import STEP, Span, activity
from harness.spec.config import RunConfig
from harness.spec.schedules import build_schedule
from harness.spec.topology import Topology

SECONDS = {"forward": [0.01, 0.02], "backward": [0.02, 0.04], "send_activation": 0.002, "optimizer": 0.005}
OVERRIDES = ("parallel.pp=2", "parallel.tp=2", "train.steps=5", "tracking.trace_steps=[4,5]")


def simulated_run(
    tmp_path: Path, dropped: str | None = None, overrides: Sequence[str] = OVERRIDES
) -> tuple[Attempt, RunConfig]:
    """An attempt whose ranks executed a simulated schedule, without one kind of instruction; replica 1 half as fast."""
    attempt = record_attempt(SweepDirectory(tmp_path, "s"), *overrides)
    config = attempt.config()
    parallel = config.parallel
    topology = Topology(pp=parallel.pp, dp=parallel.dp, tp=parallel.tp)
    schedule = build_schedule("1f1b", parallel.pp, config.num_micro_batches)
    for rank in range(parallel.world_size):
        place = topology.coordinate(rank)
        ahead = 10**9 * rank  # of rank 0's clock
        writer = SpanWriter(attempt.spans_file(rank), {"rank": rank, **place._asdict()}, ClockOffset(0, -ahead, 1))
        for step in range(3, 6):
            spans = simulate(schedule, SECONDS, step=step)[place.pp]
            shift = ahead + step * 10**9
            slow = 1 + place.dp
            moved = [s._replace(start_ns=slow * s.start_ns + shift, end_ns=slow * s.end_ns + shift) for s in spans]
            whole = Span(step, STEP, -1, moved[0].start_ns, moved[-1].end_ns)
            writer.write([*(span for span in moved if span.kind != dropped), whole])
        writer.close(ClockOffset(10**10, -ahead, 1))
    return attempt, config


def test_every_millisecond_of_a_run_has_a_part_and_the_bubble_has_causes(tmp_path: Path) -> None:
    result = breakdown(read_run(*simulated_run(tmp_path)))
    assert result["lost"] == []
    for stage, accounting in enumerate(result["accounting"]):
        assert accounting["closes"]
        assert accounting["residual_seconds"] == pytest.approx(0, abs=1e-9)
        assert accounting["seconds"]["forward"] == pytest.approx(8 * SECONDS["forward"][stage])  # type: ignore[index]
        # Only the first activation: the slower second stage computes while the others arrive.
        assert accounting["seconds"]["pp_transfer"] == pytest.approx([0, 0.002][stage], abs=1e-9)
    bubble = result["bubble"]
    assert bubble["ideal"]["fraction"] == pytest.approx(1 / 9)
    assert bubble["simulated"]["fraction"] == pytest.approx(bubble["measured"]["fraction"])
    assert bubble["causes_seconds"]["imbalance"] > bubble["causes_seconds"]["transfer"] > 0
    assert bubble["causes_seconds"]["jitter"] == pytest.approx(0, abs=1e-9)
    assert "load" not in bubble["causes_seconds"]
    assert sum(bubble["causes_percent"].values()) == pytest.approx(100 * bubble["measured"]["fraction"])


def test_a_replica_waits_for_the_latest_besides_its_bubble(tmp_path: Path) -> None:
    attempt, config = simulated_run(tmp_path / "two", overrides=("parallel.pp=2", "parallel.dp=2", "train.steps=5"))
    bubble = breakdown(read_run(attempt, config))["bubble"]
    stages = simulate(build_schedule("1f1b", 2, config.num_micro_batches), SECONDS)
    ends = max(activity(spans).last_backward_end_ns for spans in stages) / 1e9
    assert bubble["replica_wait_seconds"] == pytest.approx((2 * ends - ends) / 2)
    assert sum(bubble["causes_seconds"].values()) == pytest.approx(bubble["explained"]["seconds"])
    wait = f"{bubble['replica_wait_seconds'] * 1e3:.1f} ms a replica waits for the latest"
    assert wait in "".join(bubble_lines(bubble))
    one = breakdown(read_run(*simulated_run(tmp_path / "one")))["bubble"]
    assert one["replica_wait_seconds"] is None
    assert "replica" not in "".join(bubble_lines(one))


@pytest.mark.parametrize("kind", ["load", "send_activation", "recv_gradient", "optimizer"])
def test_a_dropped_kind_of_span_opens_the_accounts(tmp_path: Path, kind: str) -> None:
    accounting = breakdown(read_run(*simulated_run(tmp_path, dropped=kind)))["accounting"]
    assert not all(stage["closes"] for stage in accounting)


def test_pictures_and_a_trace_are_drawn(tmp_path: Path) -> None:
    attempt, _ = simulated_run(tmp_path)
    assert write_pictures(attempt) == []
    for name in ("accounting.png", "timeline.png"):
        assert (attempt.path / name).read_bytes().startswith(b"\x89PNG")
    trace = read_json(attempt.path / "trace.json")
    assert trace is not None
    assert trace_problems(trace) == []
    assert {e["args"]["step"] for e in trace["traceEvents"] if e["ph"] == "X"} == {4, 5}


def test_the_readable_part_of_a_cut_off_file_is_used_and_the_loss_is_said(tmp_path: Path) -> None:
    attempt, config = simulated_run(tmp_path)
    file = attempt.spans_file(3)
    lines = file.read_text().splitlines(keepends=True)
    cut = next(number for number, line in enumerate(lines) if line.startswith("[5,"))
    file.write_text("".join(lines[:cut]) + '[5,"recv_act')
    run = read_run(attempt, config)
    assert run.timed_steps == [3, 4]
    assert breakdown(run)["lost"] == ["the spans of rank 3 are cut off in or after step 4"]
    file.write_text("")
    assert breakdown(read_run(attempt, config)) == {
        "accounting": None, "bubble": None, "lost": ["rank 3 left no readable spans"]
    }  # fmt: skip
    assert "rank 3 left no readable spans" in write_pictures(attempt)


def test_what_a_killed_run_lost_is_told_to_whoever_waits_for_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> list[str]:
        return finish.finish([Finishing(pictures=start_pictures(attempt)), Finishing()], wandb_seconds=0.0)

    monkeypatch.setattr(finish, "PICTURES_SECONDS", 600.0)
    attempt, _ = simulated_run(tmp_path)
    assert draw() == []
    file = attempt.spans_file(1)
    file.write_text(file.read_text()[:-20])
    attempt.spans_file(2).write_text("")
    name = f"{attempt.point.name}/attempt-1"
    cut = "rank 2 left no readable spans"
    assert draw() == [f"{name}: the spans of rank 1 are cut off in or after step 5; {cut}"]
    assert read_json(attempt.path / "pictures.json") == {
        "missing": ["the spans of rank 1 are cut off in or after step 5", cut]
    }
    attempt.config_file.unlink()
    assert draw()[0].startswith(f"{name}: no pictures (ValidationError")
    attempt.metrics_file.unlink()
    assert start_pictures(attempt) is None


def test_steps_that_stand_for_a_run_are_spread_over_it() -> None:
    assert _spread(range(3, 8), 10) == [3, 4, 5, 6, 7]
    assert _spread(range(100), 10) == list(range(0, 100, 10))


def test_a_residual_is_large_on_either_side() -> None:
    accounts = [
        Accounting({**dict.fromkeys(PARTS, 0.0), "forward": 1 - residual}, step_seconds=1.0, num_missing=0)
        for residual in (-0.3, 0.1, 0.2)
    ]
    assert _mean_accounting(0, accounts)["largest_residual_percent"] == pytest.approx(30)
    assert _mean_accounting(0, accounts)["closes"]  # their mean is 0


def test_trace_steps_beyond_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracking.trace_steps=\[3, 21\] names step 21, .* train.steps=20"):
        make_config("tracking.trace_steps=[3,21]")


@pytest.mark.slow
def test_real_models_close_their_accounts_and_show_what_is_inside_an_instruction(tmp_path: Path) -> None:
    common = ["train.steps=8", "train.sequence_length=64", "train.activation_checkpointing=full"]
    overrides = {
        "a": [*common, "parallel.tp=2", "parallel.pp=2", "tracking.trace_steps=[3]", "model.num_key_value_heads=1"],
        "b": [*common, "parallel.tp=2", "parallel.pp=2", "tracking.trace_level=instructions"],
    }
    run_ranks(4, "ranks_train", {"runs": list(overrides.items())}, tmp_path)
    detailed, plain = (json.loads((tmp_path / name / "result.json").read_text()) for name in overrides)
    for accounting in (*detailed["accounting"], *plain["accounting"]):
        assert accounting["num_missing"] == 0
        assert accounting["closes"], accounting
    inside = ("tp_communication", "recomputation")
    assert all(stage["seconds"][part] > 0 for stage in detailed["accounting"] for part in inside)
    assert all(stage["seconds"][part] == 0 for stage in plain["accounting"] for part in inside)
    attempt, config = Attempt(tmp_path / "a"), make_config(*overrides["a"])
    attempt.write_config(config)
    assert write_pictures(attempt) == []
    trace = read_json(attempt.path / "trace.json")
    assert trace is not None
    assert trace_problems(trace) == []
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"forward", "backward", "recompute", "tp_all_reduce", "tp_all_gather", "transfer", "reduce_loss"} <= names
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert {event["pid"] for event in counters} == {1, 2, 3, 4}
    assert all(2**26 < event["args"]["bytes"] < 2**32 for event in counters)
