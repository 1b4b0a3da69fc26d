"""The wandb mirror, read back from wandb's own offline files, and what happens when wandb fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import MACHINE, OfflineRun, read_offline_run, record_attempt, record_inference

from harness.analyse import finish
from harness.analyse.finish import Child, Finishing, start_mirror
from harness.launch import report
from harness.machine import process_started
from harness.record import mirror as tracking
from harness.record.columns import names
from harness.record.rows import row
from harness.record.store import Attempt, SweepDirectory, environment, read_jsonl

LIMIT_SECONDS = 300.0  # for a busy machine
HOSTILE = "a|b\n[red] ü \U0001f600 \\udcff \x00"


@pytest.fixture(autouse=True)
def foreign_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables as a process inherits them that another wandb run started."""
    for name, value in {"RUN_ID": "foreign", "RUN_GROUP": "foreign", "MODE": "disabled", "DIR": "/nowhere",
                        "TAGS": "foreign", "SERVICE": "3-1-unix-/nowhere", "NAME": "foreign"}.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)


@pytest.fixture(scope="module")
def warnings() -> io.StringIO:
    """What `report.py --wandb` printed to stderr."""
    return io.StringIO()


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, warnings: io.StringIO) -> SweepDirectory:
    """A measured layout, one out of memory, one that can't be mirrored, a refused one, and the sweep."""
    sweep = SweepDirectory(tmp_path_factory.mktemp("results"), "grid")
    sweep.prepare({"overrides": ["parallel.tp=1,2"], "environment": environment(MACHINE)})
    record_attempt(sweep, "parallel.tp=2", "parallel.pp=2", "train.adam_epsilon=1e-12")
    record_attempt(sweep, "train.micro_batch_size=4", status="oom", reason=HOSTILE)
    bad = record_attempt(sweep, status="crashed", reason="rank 0: OSError")
    bad.metrics_file.unlink()
    bad.metrics_file.mkdir()
    sweep.record_invalid(["parallel.tp=3"], None, "parallel.tp=3 does not divide", "python launchers/train.py")
    with contextlib.redirect_stderr(warnings), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "finish", lambda begun, timeout: finish.finish(begun, LIMIT_SECONDS))
        report.main([str(sweep.path), "--wandb"])
    return sweep


def attempt_of(sweep: SweepDirectory, status: str) -> Attempt:
    attempts = [attempt for point in sweep.points() for attempt in point.attempts()]
    return next(attempt for attempt in attempts if attempt.status()["status"] == status)


def offline(sweep: SweepDirectory, run_id: str | None) -> OfflineRun:
    (path,) = sweep.path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    return read_offline_run(path)


def wait_for(mirror: Child | None, seconds: float = LIMIT_SECONDS) -> list[str]:
    return finish.finish([Finishing(mirror)], seconds)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def own(values: dict[str, Any]) -> dict[str, Any]:
    """Without wandb's own keys."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


class TestMeasuredRun:
    @pytest.fixture
    def attempt(self, mirrored: SweepDirectory) -> Attempt:
        return attempt_of(mirrored, "ok")

    @pytest.fixture
    def run(self, mirrored: SweepDirectory, attempt: Attempt) -> OfflineRun:
        return offline(mirrored, attempt.wandb_run_id())

    def test_identity(self, run: OfflineRun, attempt: Attempt) -> None:
        assert run.run.run_id == attempt.wandb_run_id()
        assert run.run.run_id.startswith(f"{attempt.point.name}-attempt-1-")
        assert (run.run.run_group, run.run.job_type, run.run.project) == ("grid", "point", "shardwright")
        assert sorted(run.run.tags) == ["mbs1", "ok", "pp2", "tp2"]
        assert run.exit_code == 0

    def test_config(self, run: OfflineRun, attempt: Attempt) -> None:
        config = own(run.config)
        sections = attempt.config().model_dump(mode="json")
        assert {key: config[key] for key in sections} == sections
        assert config["topology"] == {"tp": 2, "pp": 2, "dp": 1, "world_size": 4, "num_micro_batches": 8}
        found = attempt.status()["environment"]
        assert (config["versions"], config["hardware"]) == (found["versions"], found["hardware"])

    def test_history(self, run: OfflineRun, attempt: Attempt) -> None:
        assert [own(line) for line in run.history] == read_jsonl(attempt.metrics_file)
        assert set(own(run.history[0])) == {
            "step", "train/loss", "train/learning_rate", "train/grad_norm", "perf/step_seconds",
            "perf/tokens_per_second", "perf/bubble_fraction", "memory/peak_bytes",
        }  # fmt: skip
        assert len(run.history) == 5
        assert run.metrics["*"] == "step"

    def test_summary(self, run: OfflineRun, attempt: Attempt) -> None:
        assert own(run.summary) == row(attempt)
        assert set(own(run.summary)) == set(names())


class TestOtherRuns:
    def test_failed_run(self, mirrored: SweepDirectory) -> None:
        attempt = attempt_of(mirrored, "oom")
        run = offline(mirrored, attempt.wandb_run_id())
        assert sorted(run.run.tags) == ["mbs4", "oom", "pp1", "tp1"]
        assert run.exit_code == 1
        assert [line["step"] for line in run.history] == [1, 2]  # the third line was cut off
        assert run.summary["reason"] == HOSTILE
        assert run.summary["step_seconds"] is None

    def test_refused_point(self, mirrored: SweepDirectory) -> None:
        run = offline(mirrored, attempt_of(mirrored, "invalid").wandb_run_id())
        assert sorted(run.run.tags) == ["invalid", "tp3"]
        assert run.run.run_group == "grid"
        assert run.history == []
        assert run.summary["reason"] == "parallel.tp=3 does not divide"
        assert own(run.config)["parallel"] == {"tp": 3}

    def test_sweep(self, mirrored: SweepDirectory) -> None:
        run_id = json.loads((mirrored.path / "wandb" / "sweep.json").read_text())["run_id"]
        run = offline(mirrored, run_id)
        assert (run.run.job_type, run.run.run_group) == ("sweep", "grid")
        assert own(run.config)["overrides"] == ["parallel.tp=1,2"]
        assert run.summary["points/ok"] == run.summary["points/oom"] == run.summary["points/crashed"] == 1
        table = run.history[0]["results"]
        (folder,) = mirrored.path.glob(f"wandb/offline-run-*-{run_id}")
        content = json.loads((folder / "files" / table["path"]).read_text())
        assert content["columns"] == names()
        assert (table["nrows"], len(content["data"])) == (4, 4)
        rows = [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]
        assert [line["status"] for line in rows] == ["ok", "crashed", "invalid", "oom"]
        assert [line["tp"] for line in rows] == [2, 1, 3, 1]
        assert rows[0]["mfu"] is None
        assert rows[0]["wandb_run_id"] == attempt_of(mirrored, "ok").wandb_run_id()

    def test_one_that_fails_is_one_warning_and_stops_no_other(
        self, mirrored: SweepDirectory, warnings: io.StringIO
    ) -> None:
        assert attempt_of(mirrored, "crashed").wandb_run_id() is None
        assert warnings.getvalue().startswith("warning: wandb is not complete (IsADirectoryError: ")
        assert warnings.getvalue().count("\n") == 1
        complete = [
            path for path in mirrored.path.glob("wandb/offline-run-*/*.wandb") if read_offline_run(path).exit_code == 0
        ]
        assert len(complete) == 2  # the measured layout and the sweep


def test_generation_has_a_history_and_a_summary(tmp_path: Path) -> None:
    attempt = record_inference(SweepDirectory(tmp_path, "grid"), "parallel.pp=2")
    assert wait_for(start_mirror(attempt)) == []
    run = offline(attempt.sweep, attempt.wandb_run_id())
    assert [own(line) for line in run.history] == read_jsonl(attempt.metrics_file)
    assert [line["perf/decode_tokens_per_second"] for line in run.history] == pytest.approx(
        [998 / 0.3, 998 / 0.375, 998 / 0.45]
    )
    assert own(run.summary) == row(attempt)
    assert run.summary["decode_tokens_per_second"] == pytest.approx(998 / 0.375)
    assert own(run.config)["generate"]["batch_size"] == 8
    assert sorted(run.run.tags) == ["ok", "pp2", "tp1"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """A run after its first step, in the middle of writing the second line."""
    sweep = SweepDirectory(tmp_path_factory.mktemp("results"), "live")
    attempt = record_attempt(sweep, "tracking.live=true")
    attempt.write_status("running")
    lines = attempt.metrics_file.read_text()
    attempt.metrics_file.with_name("whole").write_text(lines)
    attempt.metrics_file.write_text(lines[: lines.index("\n") + 20])
    return attempt


class TestLive:
    def test_given_up_it_leaves_a_warning_and_no_process(self, running: Attempt) -> None:
        mirror = start_mirror(running)
        assert mirror is not None
        wait_until(lambda: any(running.sweep.path.glob("wandb/offline-run-*/*.wandb")))
        family = [
            mirror.process.pid,
            *(child.pid for child in psutil.Process(mirror.process.pid).children(recursive=True)),
        ]
        (warning,) = wait_for(mirror, 0.0)
        assert "not done in 0 s" in warning
        assert "report.py --wandb" in warning
        wait_until(lambda: not any(map(process_started, family)))
        assert running.wandb_run_id() is None

    def test_follows_a_run_to_its_end_and_replaces_what_was_given_up(self, running: Attempt) -> None:
        mirror = start_mirror(running)
        time.sleep(0.5)
        running.metrics_file.with_name("whole").rename(running.metrics_file)
        running.write_status("ok")
        assert wait_for(mirror) == []
        run = offline(running.sweep, running.wandb_run_id())  # one folder
        assert [own(line) for line in run.history] == read_jsonl(running.metrics_file)
        assert len(run.history) == 5
        assert "ok" in run.run.tags
        assert run.summary["status"] == "ok"

    def test_ends_with_the_process_that_started_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        attempt = record_attempt(SweepDirectory(tmp_path, "orphan"))
        attempt.write_status("running")
        parents = iter([1000, 1000, 1])
        monkeypatch.setattr(os, "getppid", lambda: next(parents))
        monkeypatch.setattr(time, "sleep", lambda _: None)
        assert len(list(tracking._follow(attempt))) == 5


class TestFailure:
    def test_missing_wandb_is_one_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        attempt = record_attempt(SweepDirectory(tmp_path / "results", "grid"))
        (warning,) = wait_for(start_mirror(attempt))
        assert warning.startswith("wandb is not complete (ImportError: no wandb here);")
        assert attempt.wandb_run_id() is None
        assert row(attempt)["wandb_run_id"] is None

    def test_no_key_for_online_is_one_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        attempt = record_attempt(SweepDirectory(tmp_path, "grid"), "tracking.wandb.mode=online")
        (warning,) = wait_for(start_mirror(attempt))
        assert "wandb is not complete" in warning
        assert "API key" in warning or "api_key" in warning

    def test_disabled_starts_nothing(self, tmp_path: Path) -> None:
        attempt = record_attempt(SweepDirectory(tmp_path, "grid"), "tracking.wandb.mode=disabled")
        assert start_mirror(attempt) is None
        assert wait_for(None) == []

    def test_process_that_cant_start_is_survived(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        attempt = record_attempt(SweepDirectory(tmp_path, "grid"))
        monkeypatch.setattr(finish.sys, "executable", str(tmp_path / "nowhere"))
        assert start_mirror(attempt) is None
