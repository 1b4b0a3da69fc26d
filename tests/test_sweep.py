"""Grids: expansion, checking, reuse, failures and interruption; ranks are not started here."""

from __future__ import annotations

import csv
import os
import shlex
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import MACHINE, make_config, step_records

from harness.errors import ConfigError
from harness.launch import attempts, sweep
from harness.launch.backends import local
from harness.launch.backends.local import Slots
from harness.launch.compose import Composer
from harness.launch.points import check_points, expand
from harness.launch.sweep import Measured, run_batch
from harness.machine import Machine, detect_machine
from harness.record.columns import measured_columns
from harness.record.diagnose import Outcome
from harness.record.sources import MeasuredRun
from harness.record.store import Attempt, SweepDirectory, environment, read_json, write_json
from harness.spec.config import RunConfig
from harness.spec.engines import ENGINES


class TestExpand:
    def test_product_of_all_axes(self) -> None:
        assert expand(["parallel.tp=1,2", "train.steps=5", "parallel.pp=range(1,3)"], {}, []) == [
            ["parallel.tp=1", "train.steps=5", "parallel.pp=1"],
            ["parallel.tp=1", "train.steps=5", "parallel.pp=2"],
            ["parallel.tp=2", "train.steps=5", "parallel.pp=1"],
            ["parallel.tp=2", "train.steps=5", "parallel.pp=2"],
        ]

    def test_the_command_line_wins_over_the_grid_of_a_file(self) -> None:
        params = {"parallel.tp": "1,2", "model": "choice(gpt2_tiny,llama_tiny)"}
        assert expand(["parallel.tp=4"], params, []) == [
            ["parallel.tp=4", "model=gpt2_tiny"],
            ["parallel.tp=4", "model=llama_tiny"],
        ]

    def test_explicit_points_are_combined_with_the_axes(self) -> None:
        points = ["parallel.tp=2 parallel.pp=1", "parallel.pp=2 'data.path=a b'"]
        assert expand(["train.micro_batch_size=1,2"], {}, points) == [
            ["train.micro_batch_size=1", "parallel.tp=2", "parallel.pp=1"],
            ["train.micro_batch_size=1", "parallel.pp=2", "data.path=a b"],
            ["train.micro_batch_size=2", "parallel.tp=2", "parallel.pp=1"],
            ["train.micro_batch_size=2", "parallel.pp=2", "data.path=a b"],
        ]

    def test_nothing_to_sweep_is_one_point(self) -> None:
        assert expand([], {}, []) == [[]]

    def test_deepspeed_settings_can_be_swept(self) -> None:
        grid = expand([], {"deepspeed.zero_optimization.reduce_bucket_size": "1000,2000"}, [])
        buckets = [Composer().compose(point)["deepspeed"]["zero_optimization"]["reduce_bucket_size"] for point in grid]
        assert buckets == [1000, 2000]

    @pytest.mark.parametrize("points", ["parallel.tp=2", 3, [3], ["'unclosed"], {"a": 1}])
    def test_points_of_another_form_are_refused(self, points: object) -> None:
        with pytest.raises(ConfigError, match=r"sweep\.points="):
            expand([], {}, [points] if isinstance(points, dict) else points)

    def test_intervals_have_no_values_to_run(self) -> None:
        with pytest.raises(ConfigError, match="has no countable values"):
            expand(["train.learning_rate=interval(0,1)"], {}, [])


class Ranks:
    """Stands in for processes: every point succeeds unless `fails` names its layout."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fails: dict[str, Outcome] = {}
        self.parity: dict[str, dict[str, object] | Outcome] = {}

    def run_attempt(
        self,
        attempt: Attempt,
        config: RunConfig,
        machine: Machine,
        echo: bool,
        task: str = "train",
        received: object = None,
    ) -> Outcome:
        self.started.append(f"{attempt.point.slug}/{attempt.path.name}")
        attempt.write_status("running", environment=environment(machine))
        attempt.log_file.touch()
        outcome = self.fails.get(config.slug, Outcome("ok"))
        if task == "verify":
            found = self.parity[config.slug]
            outcome = found if isinstance(found, Outcome) else Outcome("ok")
            if outcome.status == "ok":
                write_json(attempt.result_file, found)
        elif outcome.status == "ok":
            records = step_records([0.1] * 4)
            row = measured_columns(MeasuredRun(config, records, machine))
            write_json(attempt.result_file, {"row": row})
        attempt.write_status(outcome.status, outcome.reason)
        return outcome


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    stand_in = Ranks()
    monkeypatch.setattr(attempts, "run_attempt", stand_in.run_attempt)
    monkeypatch.setattr(sweep, "detect_machine", lambda: MACHINE)
    return stand_in


def measure(folder: Path, points: Sequence[str], *base: str, first: bool = True) -> list[Measured]:
    """Run points, each a string of overrides, under the name `grid`."""
    always = [f"results_dir={folder}", "sweep.name=grid", "tracking.wandb.mode=disabled", *base]
    batch = [[*always, *shlex.split(point)] for point in points]
    return run_batch(batch, Composer(), SweepDirectory(folder, "grid"), {"overrides": list(base)}, first)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "grid" / "results.csv").open() as file:
        return {row["point"].rpartition("_")[0]: row for row in csv.DictReader(file)}


def test_a_grid_with_corners_that_fail(tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.fails["tp1_pp2_dp1_mbs1"] = Outcome("oom", "rank 1: OutOfMemoryError: no more")
    points = ["parallel.tp=1", "parallel.tp=3", "parallel.pp=2", "parallel.tp=1", "parallel.tp=2"]
    measured = measure(tmp_path, points)
    assert [point.status for point in measured] == ["ok", "invalid", "oom", "ok", "ok"]
    assert [point.tokens_per_second > 0 for point in measured] == [True, False, False, True, True]
    assert ranks.started == [f"{slug}_dp1_mbs1/attempt-1" for slug in ("tp1_pp1", "tp1_pp2", "tp2_pp1")]
    table = rows(tmp_path)
    assert table["tp1_pp2_dp1_mbs1"]["reason"] == "rank 1: OutOfMemoryError: no more"
    assert table["invalid"]["reason"].startswith("model.num_attention_heads=8 can't be split over parallel.tp=3")
    assert len(table) == 4
    output = capsys.readouterr().out
    assert "5 points: 3 to run, 0 reused, 1 can't run" in output
    assert "[2/3] tp1_pp2_dp1_mbs1" in output
    assert "1 left" in output
    assert not list(tmp_path.glob("grid/wandb"))


def test_engines_stand_beside_each_other(tmp_path: Path, ranks: Ranks) -> None:
    passed: dict[str, object] = {"parity": "pass", "parity_max_error": 1e-7, "comparisons": []}
    ranks.parity = {f"tp1_pp{pp}_dp1_mbs1": passed for pp in (1, 2)}
    points = [f"parallel.engine={engine} parallel.pp={pp}" for engine in ENGINES for pp in (1, 2)]
    measured = measure(tmp_path, points, "sweep.verify=true")
    assert [point.status for point in measured] == ["ok"] * 5 + ["invalid", "ok", "invalid"]
    assert len(ranks.started) == 2 * 6  # each is checked, then measured
    with (tmp_path / "grid" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    ran = sorted((row["engine"], row["pp"]) for row in table if row["status"] == "ok")
    assert ran == [
        ("ddp", "1"),
        ("deepspeed", "1"),
        ("deepspeed", "2"),
        ("dtensor", "1"),
        ("torch", "1"),
        ("torch", "2"),
    ]
    assert all("use parallel.engine=deepspeed" in row["reason"] for row in table if row["status"] == "invalid")
    shown = (tmp_path / "grid" / "results.md").read_text()
    assert all(f"| {engine} |" in shown for engine in ENGINES)


def test_the_command_repeats_the_point(tmp_path: Path, ranks: Ranks) -> None:
    measure(tmp_path, ["parallel.tp=2 parallel.partition=[4]"], "data.path=null")
    assert rows(tmp_path)["tp2_pp1_dp1_mbs1"]["command"] == (
        f"deepspeed --num_gpus 2 launchers/train.py results_dir={tmp_path} tracking.wandb.mode=disabled "
        "data.path=null parallel.tp=2 'parallel.partition=[4]'"
    )


def test_what_is_measured_is_reused_and_what_failed_runs_again_where_asked(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.fails["tp2_pp1_dp1_mbs1"] = Outcome("crashed", "rank 0: ValueError: flaky")
    measure(tmp_path, ["", "parallel.tp=2"])
    ranks.fails.clear()
    ranks.started.clear()
    capsys.readouterr()
    for retry in ("", "sweep.retry=[oom,hang]"):
        measured = measure(tmp_path, ["", "parallel.tp=2"], *filter(None, [retry]))
        assert [point.status for point in measured] == ["ok", "crashed"]
        assert ranks.started == []
        output = " ".join(capsys.readouterr().out.split())
        assert "2 points: 0 to run, 1 reused, 1 failed before, 0 can't run" in output
        assert "crashed before; sweep.retry=[crashed] runs it again" in output
    again = ["sweep.retry=[crashed]", "tracking.span_steps=3", "launch.timeout_seconds=9.0"]
    measured = measure(tmp_path, ["", "parallel.tp=2"], *again)
    assert [point.status for point in measured] == ["ok", "ok"]
    assert ranks.started == ["tp2_pp1_dp1_mbs1/attempt-2"]
    assert "reused" in capsys.readouterr().out
    assert len(list(tmp_path.glob("grid/points/tp2*/attempt-1/status.json"))) == 1
    assert [row["status"] for row in rows(tmp_path).values()] == ["ok", "ok"]


def test_asking_for_checkpoints_runs_a_point_that_has_none(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.parity["tp1_pp1_dp1_mbs1"] = {"parity": "pass", "parity_max_error": 0.0, "comparisons": []}
    measure(tmp_path, [""])
    for asked, found in [
        ("train.checkpoint_interval=5", "1 to run, 0 reused"),
        ("train.checkpoint_interval=5 train.keep_checkpoints=4", "1 to run, 0 reused"),
        ("train.checkpoint_interval=5", "0 to run, 1 reused"),
        ("train.keep_checkpoints=4", "0 to run, 1 reused"),  # of none
    ]:
        capsys.readouterr()
        measure(tmp_path, [asked], "sweep.verify=true")
        assert f"1 points: {found}" in capsys.readouterr().out, asked
    assert len(list(tmp_path.glob("grid/parity/*"))) == 1  # they compute the same
    with (tmp_path / "grid" / "results.csv").open() as file:
        assert sorted(row["checkpoint_interval"] for row in csv.DictReader(file)) == ["0", "5", "5"]
    assert "steps per checkpoint" in (tmp_path / "grid" / "results.md").read_text()


def test_a_stale_measurement_is_kept_and_made_again(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.fails["tp2_pp1_dp1_mbs1"] = Outcome("oom", "out of memory there")
    measure(tmp_path, ["", "parallel.tp=2"])
    other = Machine("cpu", "another cpu", 2, 2, 2**33)
    monkeypatch.setattr(sweep, "detect_machine", lambda: other)
    measure(tmp_path, ["", "parallel.tp=2"])
    assert "2 points: 2 to run, 0 reused, 0 can't run" in (output := capsys.readouterr().out)
    assert "stale: measured with other versions, hardware or code" in output
    assert ranks.started == [f"tp{tp}_pp1_dp1_mbs1/attempt-{number}" for number in (1, 2) for tp in (1, 2)]
    assert len(list(tmp_path.glob("grid/points/tp1*/attempt-*/result.json"))) == 2


def test_a_failed_repeat_runs_again_where_asked(tmp_path: Path, ranks: Ranks) -> None:
    measure(tmp_path, [""])
    ranks.fails["tp1_pp1_dp1_mbs1"] = Outcome("crashed", "rank 0: ValueError: flaky")
    measure(tmp_path, [""], "sweep.repeats=2")
    ranks.fails.clear()
    measure(tmp_path, [""])
    assert [row["status"] for row in rows(tmp_path).values()] == ["crashed"]
    measure(tmp_path, [""], "sweep.retry=[crashed]")
    assert [row["status"] for row in rows(tmp_path).values()] == ["ok"]
    assert ranks.started == [f"tp1_pp1_dp1_mbs1/attempt-{number}" for number in (1, 2, 3)]


def test_an_interrupted_sweep_resumes_where_it_stopped(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    points = ["", "parallel.tp=2", "parallel.pp=2"]
    ranks.fails["tp2_pp1_dp1_mbs1"] = Outcome("interrupted", "stopped by SIGINT before it finished")
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, points)
    assert "To resume, run it again" in capsys.readouterr().out
    assert [row["status"] for row in rows(tmp_path).values()] == ["ok", "interrupted", "interrupted"]
    ranks.fails.clear()
    ranks.started.clear()
    measure(tmp_path, points)
    assert ranks.started == ["tp2_pp1_dp1_mbs1/attempt-2", "tp1_pp2_dp1_mbs1/attempt-1"]
    assert {row["status"] for row in rows(tmp_path).values()} == {"ok"}


def test_what_is_measured_while_an_earlier_sweep_is_ended_counts(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That sweep and its guard were killed, its ranks go on."""
    measure(tmp_path, [""])
    ranks.started.clear()
    result = next(tmp_path.glob("*/points/*/attempt-1/result.json"))
    gone = {"status": "running", "pid": 1, "pid_started": -1}
    write_json(result.with_name("status.json"), read_json(result.with_name("status.json")) | gone)
    result.rename(result.with_name("later"))
    monkeypatch.setattr(local, "end_marked", lambda _: result.with_name("later").rename(result))
    measure(tmp_path, ["", "parallel.tp=2"])
    assert ranks.started == ["tp2_pp1_dp1_mbs1/attempt-1"]
    assert [row["status"] for row in rows(tmp_path).values()] == ["ok", "ok"]


def test_repeats_are_attempts_in_interleaved_order(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    points = ["", "parallel.tp=2"]
    measure(tmp_path, points)
    assert [row["repeats"] for row in rows(tmp_path).values()] == ["1", "1"]
    ranks.started.clear()
    capsys.readouterr()
    measured = measure(tmp_path, [*points, "parallel.pp=2"], "sweep.repeats=3")
    one, two, three = "tp1_pp1_dp1_mbs1", "tp2_pp1_dp1_mbs1", "tp1_pp2_dp1_mbs1"
    assert ranks.started == [f"{one}/attempt-2", f"{two}/attempt-2", f"{three}/attempt-1",
                             f"{one}/attempt-3", f"{two}/attempt-3", f"{three}/attempt-2",
                             f"{three}/attempt-3"]  # fmt: skip
    assert "3 points: 3 to run (7 runs), 0 reused" in capsys.readouterr().out
    assert [point.status for point in measured] == ["ok"] * 3
    table = rows(tmp_path)
    assert [row["repeats"] for row in table.values()] == ["3"] * 3
    assert "sweep.repeats" not in table[one]["command"]
    measure(tmp_path, points, "sweep.repeats=2")
    assert len(ranks.started) == 7  # more than asked for is no reason to run


def test_a_repeat_that_failed_is_made_again(tmp_path: Path, ranks: Ranks) -> None:
    measure(tmp_path, [""], "sweep.repeats=2")
    ranks.fails["tp1_pp1_dp1_mbs1"] = Outcome("crashed", "rank 0: ValueError: flaky")
    assert [point.status for point in measure(tmp_path, [""], "sweep.repeats=3")] == ["crashed"]
    assert [row["status"] for row in rows(tmp_path).values()] == ["crashed"]
    ranks.fails.clear()
    again = measure(tmp_path, [""], "sweep.repeats=3", "sweep.retry=[crashed]")
    assert [point.status for point in again] == ["ok"]
    assert [(row["attempt"], row["repeats"]) for row in rows(tmp_path).values()] == [("4", "3")]


def test_repeats_of_another_environment_do_not_count(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path, [""], "sweep.repeats=2")
    monkeypatch.setattr(sweep, "detect_machine", lambda: Machine("cpu", "another cpu", 2, 2, 2**33))
    measure(tmp_path, [""], "sweep.repeats=2")
    assert [(row["attempt"], row["repeats"]) for row in rows(tmp_path).values()] == [("4", "2")]


def test_nothing_that_can_run_leaves_no_trace(tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    measured = measure(tmp_path, ["parallel.tp=3", "parallel.tp=3 parallel.pp=2", "data.path=/nope"])
    assert [point.status for point in measured] == ["invalid"] * 3
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "parallel.tp=3" in errors[0]
    assert "/nope" in errors[1]
    assert list(tmp_path.iterdir()) == []


def test_a_later_batch_records_what_it_can_not_run(tmp_path: Path, ranks: Ranks) -> None:
    measure(tmp_path, [""])
    assert measure(tmp_path, ["parallel.tp=3"], first=False)[0].status == "invalid"
    assert set(rows(tmp_path)) == {"tp1_pp1_dp1_mbs1", "invalid"}


def test_a_refused_point_that_can_run_after_all_has_one_row(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    points = ["", f"data.path={text}"]
    measure(tmp_path, points)
    text.write_text("It is a truth universally acknowledged. " * 100)
    measure(tmp_path, points)
    assert [row["status"] for row in rows(tmp_path).values()] == ["ok"]
    assert len(list((tmp_path / "grid" / "points").iterdir())) == 2


def test_two_processes_can_not_run_one_sweep(tmp_path: Path, ranks: Ranks) -> None:
    with (
        sweep._alone(SweepDirectory(tmp_path, "grid")),
        pytest.raises(ConfigError, match=rf"sweep\.name=grid is running in process {os.getpid()} on host \S+; wait"),
    ):
        measure(tmp_path, [""])
    assert ranks.started == []


def test_a_dry_run_says_what_would_happen_and_leaves_no_trace(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    points = ["", "parallel.tp=2", "parallel.tp=3"]
    measured = measure(tmp_path, points, "sweep.dry_run=true")
    assert [point.status for point in measured] == ["pending", "pending", "invalid"]
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "3 points: 2 to run, 0 reused, 1 can't run" in output
    assert "Expected" not in output
    measure(tmp_path, points[:1])
    capsys.readouterr()
    measure(tmp_path, points, "sweep.dry_run=true")
    output = capsys.readouterr().out
    assert "3 points: 1 to run, 1 reused, 1 can't run" in output
    assert "Expected: about 0 s." in output
    assert ranks.started == ["tp1_pp1_dp1_mbs1/attempt-1"]


def comparison(error: float, passed: bool) -> dict[str, object]:
    return {"kind": "gradient", "worst": "layer.0.qkv", "error": error, "tolerance": 1e-5, "passed": passed}


def test_a_layout_that_fails_its_parity_check_has_no_rank(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"parity": "pass", "parity_max_error": 1e-6, "comparisons": [comparison(1e-6, True)]}
    bad = {"parity": "fail", "parity_max_error": 0.1, "comparisons": [comparison(0.1, False)]}
    ranks.parity = {"tp1_pp1_dp1_mbs1": good, "tp2_pp1_dp1_mbs1": bad}
    points = ["", "parallel.tp=2", "train.seed=2 train.steps=30", "parallel.tp=2 train.seed=2"]
    for _ in range(2):
        measured = measure(tmp_path, points, "sweep.verify=true")
    assert [point.status for point in measured] == ["ok", "unverified"] * 2
    assert [point.tokens_per_second > 0 for point in measured] == [True, False] * 2
    assert len(ranks.started) == 2 + 4  # checked once, before the first point
    assert all("attempt-1" in started for started in ranks.started)
    assert len(list(tmp_path.glob("grid/parity/*/attempt-1/result.json"))) == 2
    table = rows(tmp_path)
    assert table["tp1_pp1_dp1_mbs1"]["parity"] == "pass"
    assert table["tp2_pp1_dp1_mbs1"]["parity"] == "fail"
    assert float(table["tp2_pp1_dp1_mbs1"]["parity_max_error"]) == 0.1
    reason = "fails the parity check: gradient of layer.0.qkv is off by 1.0e-01, allowed 1e-05"
    assert table["tp2_pp1_dp1_mbs1"]["reason"] == reason
    assert list(table)[-1] == "tp2_pp1_dp1_mbs1"
    assert f"tp2 pp1 dp1 mbs1 has no rank: {reason}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "ended", [Outcome("crashed", "rank 1: ValueError: broken"), Outcome("timeout", "no result after 5 s")]
)
def test_a_parity_check_that_does_not_finish_leaves_its_layout_without_a_rank(
    tmp_path: Path, ranks: Ranks, ended: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"parity": "pass", "parity_max_error": 1e-6, "comparisons": [comparison(1e-6, True)]}
    ranks.parity = {"tp1_pp1_dp1_mbs1": good, "tp2_pp1_dp1_mbs1": ended}
    points = ["", "parallel.tp=2"]
    measured = measure(tmp_path, points, "sweep.verify=true")
    assert [point.status for point in measured] == ["ok", "unverified"]
    unknown = rows(tmp_path)["tp2_pp1_dp1_mbs1"]
    reason = f"the parity check did not finish: {ended.reason}"
    assert (unknown["status"], unknown["parity"], unknown["reason"]) == ("ok", "unknown", reason)
    assert (unknown["parity_max_error"], list(rows(tmp_path))[-1]) == ("", "tp2_pp1_dp1_mbs1")
    assert f"tp2 pp1 dp1 mbs1 has no rank: {reason}." in " ".join(capsys.readouterr().out.split())
    measure(tmp_path, points, "sweep.repeats=2")  # nobody asks for the check: its verdict stays
    assert rows(tmp_path)["tp2_pp1_dp1_mbs1"]["parity"] == "unknown"
    ranks.parity["tp2_pp1_dp1_mbs1"] = good
    again = measure(tmp_path, points, "sweep.repeats=2", "sweep.verify=true")
    assert [point.status for point in again] == ["ok", "ok"]
    assert (rows(tmp_path)["tp2_pp1_dp1_mbs1"]["parity"], rows(tmp_path)["tp2_pp1_dp1_mbs1"]["reason"]) == ("pass", "")


def test_points_at_once_share_no_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    machine = Machine("cpu", "test", len(cores), len(cores), 2**33)
    small, large = (make_config("launch.slots=2", f"launch.threads_per_rank={n}") for n in (1, 99))
    slots = Slots(machine, 2)
    first = slots.take(small)
    assert first is not None
    assert first.visible_devices == (cores[0],)
    assert slots.take(large) is None  # needs all of them
    if len(cores) > 1:
        second = slots.take(small)
        assert second is not None
        assert second.visible_devices == (cores[1],)
        slots.give_back(second)
    slots.give_back(first)
    everything = slots.take(large)
    assert everything is not None
    assert everything.visible_devices == tuple(cores)


def test_points_at_once_share_no_gpu() -> None:
    machine = Machine("cuda", "test", 4, 8, 2**33, visible_devices=(0, 2, 5, 7))
    one, two = (make_config(f"parallel.dp={n}", "launch.slots=3") for n in (1, 2))
    slots = Slots(machine, 3)
    shares = [slots.take(config) for config in (two, one, two, one, one)]
    assert [share and share.visible_devices for share in shares] == [(0, 2), (5,), None, (7,), None]
    assert [share and share.visible_devices for share in [Slots(machine, 1).take(one)]] == [(0, 2, 5, 7)]


def test_points_run_side_by_side(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    together, run = threading.Barrier(2, timeout=20), ranks.run_attempt

    def meet(*arguments: Any, **options: Any) -> Outcome:
        together.wait()
        return run(*arguments, **options)

    monkeypatch.setattr(attempts, "run_attempt", meet)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    points = [f"train.seed={seed}" for seed in range(4)]
    measured = measure(tmp_path, points, "launch.slots=2")
    assert [point.status for point in measured] == ["ok"] * 4
    with (tmp_path / "grid" / "results.csv").open() as file:
        assert [row["slots"] for row in csv.DictReader(file)] == ["2"] * 4
    assert "shared memory bandwidth" in (tmp_path / "grid" / "results.md").read_text()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_share_is_the_machine_but_for_what_it_may_use(kind: Literal["cpu", "cuda"]) -> None:
    machine = replace(detect_machine(), device_kind=kind, visible_devices=(0, 1, 2))
    share = Slots(machine, 2).take(make_config("launch.slots=2", "launch.threads_per_rank=1"))
    assert share is not None
    assert len(share.visible_devices) == 1
    assert replace(share, visible_devices=machine.visible_devices) == machine


def test_a_thousand_points_are_checked_in_seconds() -> None:
    grid = expand(
        ["parallel.tp=1,2,4,8", "parallel.pp=range(1,5)", "train.micro_batch_size=1,2,4,8", "train.seed=range(0,16)"],
        {},
        [],
    )
    candidates = check_points(grid, Composer(), MACHINE)
    assert len(candidates) == 1024
    assert len({candidate.identity for candidate in candidates if candidate.config}) > 500
