"""Broken input: whatever is wrong, one clear sentence, the right exit status, nothing lost and nothing executed."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import MACHINE, record_attempt

from harness.launch import attempts, report, single, sweep, train
from harness.launch.points import decide
from harness.record.diagnose import Outcome
from harness.record.store import Attempt, Point, SweepDirectory, environment, write_json
from harness.spec.config import REPOSITORY

Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Call a launcher in an empty folder; ranks are not started, and measure nothing."""

    def run_attempt(attempt: Attempt, *_: object, **__: object) -> Outcome:
        attempt.write_status("running", environment=environment(MACHINE))
        write_json(attempt.result_file, {"row": {"tokens_per_second": 1.0}})
        attempt.log_file.touch()
        attempt.write_status("ok")
        return Outcome("ok")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attempts, "run_attempt", run_attempt)
    for module in (single, sweep):
        monkeypatch.setattr(module, "detect_machine", lambda: MACHINE)
    main = {"train": train.main, "sweep": sweep.main, "report": report.main}

    def call(launcher: str, arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", [f"{launcher}.py", *arguments])
        return main[launcher](arguments)

    return call


OVERRIDES = [
    # what can't be read
    ("train", "steps", "'steps' can't be read as an override"),
    ("train", "=3", "'3' is no file of"),
    ("train", "'train.steps=[1,2'", "can't be read as an override"),
    ("train", "'data.path=a b=c'", "can't be read as an override"),
    ("train", "'train.steps=${nowhere}'", "Interpolation key 'nowhere' not found"),
    ("train", "'train.steps=${oc.env:NOWHERE}'", "'NOWHERE' not found"),
    ("train", "train.steps=1,2", "use launchers/sweep.py to run each"),
    # names
    ("train", "train.stepz=3", "did you mean train.steps?"),
    ("train", "parallel.ttp=2", "did you mean parallel.tp?"),
    ("train", "model=gpt5", "model=gpt5 is not available; choose one of"),
    ("train", "model=../../etc/passwd", "is not available"),
    ("train", "~train.steps", "train.steps is missing"),
    ("train", "deepspeed.zero_optimisation.stage=1", "did you mean deepspeed.zero_optimization?"),
    ("train", "deepspeed.train_batch_size=8", "set train.global_batch_size"),
    # types and ranges
    ("train", "parallel.tp=0", "parallel.tp=0 is not valid"),
    ("train", "parallel.tp=-2", "parallel.tp=-2 is not valid"),
    ("train", "parallel.tp=2.0", "parallel.tp=2.0 is not valid"),
    ("train", "parallel.tp=true", "parallel.tp=True is not valid"),
    ("train", "parallel.tp=null", "parallel.tp=None is not valid"),
    ("train", "parallel.tp=99999999999999999999", "can't be split over"),
    ("train", "parallel.tp=[1,2]", "parallel.tp=[1, 2] is not valid"),
    ("train", "train.learning_rate=nan", "train.learning_rate=nan is not valid"),
    ("train", "train.learning_rate=inf", "train.learning_rate=inf is not valid"),
    ("train", "train.precision=fp8", "train.precision='fp8' is not valid"),
    ("train", "train.precision=fp16", "not supported on CPU"),
    ("train", "launch.timeout_seconds=0.0", "launch.timeout_seconds=0.0 is not valid"),
    ("train", "launch.hang_seconds=-1.0", "launch.hang_seconds=-1.0 is not valid"),
    ("train", "launch.memory_limit_bytes=1.5", "launch.memory_limit_bytes=1.5 is not valid"),
    ("train", "launch.master_port=70000", "launch.master_port=70000 is not valid"),
    ("train", "train=5", "train=5 is not available"),
    # secrets
    ("train", "+deepspeed.comet={api_key:abc}", "api_key is given a secret, which would be written to files; put it"),
    ("sweep", "deepspeed.comet.api_key=abc parallel.tp=1,2", "deepspeed.comet.api_key is given a secret"),
    ("sweep", "sweep.points=['deepspeed.comet.api_key=abc']", "deepspeed.comet.api_key is given a secret"),
    ("train", "'tracking.wandb.entity=${oc.env:PATH}'", "tracking.wandb.entity='${oc.env:PATH}' would be written"),
    ("sweep", "'sweep.name=${oc.env:PATH}'", "sweep.name='${oc.env:PATH}' is not a folder name"),
    # what does not fit together
    ("train", "parallel.tp=3", "can't be split over parallel.tp=3; use tp 1, 2, 4 or 8"),
    ("train", "parallel.pp=5", "parallel.pp=5 stages exceed"),
    ("train", "train.global_batch_size=7 train.micro_batch_size=2", "is not a multiple of"),
    ("train", "train.steps=2", "leaves nothing to time"),
    # paths
    ("train", "data.path=missing", "data.path='missing' does not exist"),
    ("train", "train.resume=missing", "train.resume"),
    ("train", "data.path=empty", "empty"),
    ("train", "results_dir=file", "set results_dir to a folder you can write to"),
    ("train", "results_dir=file/below", "set results_dir to a folder you can write to"),
    # grids
    ("sweep", "parallel.tp=1,2 train.stepz=3", "did you mean train.steps?"),
    ("sweep", "parallel.tp=3,5", "can't be split over parallel.tp=5"),
    ("sweep", "train.learning_rate=interval(0,1)", "has no countable values"),
    ("sweep", "sweep=nope", "sweep=nope is not available"),
    ("sweep", "sweep.points=parallel.tp=2", "can't be read as an override"),
    ("sweep", "sweep.points=[3]", "sweep.points=[3] is no list of overrides"),
    ("sweep", """'sweep.points=["a=\\"b"]'""", "is no list of overrides"),
    ("sweep", "sweep.retry=oom", "sweep.retry='oom' is not valid"),
    ("sweep", "sweep.retry=[ok]", "sweep.retry.0='ok' is not valid"),
    ("sweep", "sweep.repeats=0", "sweep.repeats=0 is not valid"),
    ("sweep", "launch.slots=0", "launch.slots=0 is not valid"),
    ("sweep", "launch.slots=1,2", "launch.slots=1,2: all points of a sweep share launch.slots; give it one value"),
    ("sweep", "sweep.name=a,b", "all points of a sweep share sweep.name"),
    ("sweep", "sweep=default,quickstart", "all points of a sweep share sweep"),
    ("sweep", """'sweep.points=["launch.slots=2"]'""", "launch.slots=2 is no point's"),
    # names of sweeps
    ("sweep", "sweep.name=a/b", "sweep.name='a/b' is not a folder name"),
    ("sweep", "sweep.name=..", "sweep.name='..' is not a folder name"),
    ("sweep", "sweep.name=/tmp/x", "sweep.name='/tmp/x' is not a folder name"),
    ("sweep", "sweep.name=.hidden", "sweep.name='.hidden' is not a folder name"),
    ("sweep", "sweep.name=''", "sweep.name='' is not a folder name"),
    ("sweep", "sweep.name=null", "sweep.name=None is not a text"),
    ("sweep", "sweep.name=1.5", "sweep.name=1.5 is not a text"),
    ("sweep", "'sweep.name=a b'", "sweep.name='a b' is not a folder name"),
    ("sweep", """'sweep.name="a b"'""", "sweep.name='a b' is not a folder name"),
    ("sweep", """'sweep.name="it'\\''s"'""", "is not a folder name"),
    ("sweep", """'sweep.name="$(touch owned)"'""", "sweep.name='$(touch owned)' is not a folder name"),
    ("sweep", """'sweep.name="`touch owned`"'""", "is not a folder name"),
    ("sweep", """'sweep.name="a;touch owned"'""", "is not a folder name"),
    ("sweep", "'sweep.name=\"a\\nb\"'", "is not a folder name"),
    ("sweep", "sweep.name=ümlaut", "can't be read as an override"),
    ("sweep", """'sweep.name="ümlaut"'""", "is not a folder name"),
    ("sweep", f"sweep.name={'x' * 101}", "is not a folder name"),
    *(("sweep", f"sweep.name={name}", f"sweep.name={name} is the folder of something else")
      for name in ("runs", "verify", "published", "comm_bench")),
    # reports
    ("report", "missing", "missing is not a folder of results"),
    ("report", "file", "file is not a folder of results"),
    ("report", ".", "it has no points/"),
]  # fmt: skip


@pytest.mark.parametrize(("launcher", "arguments", "sentence"), OVERRIDES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_a_sentence_and_exit_2(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str, arguments: str, sentence: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert start(launcher, shlex.split(arguments)) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.out == ""
    assert len(printed.err.splitlines()) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(("parity", "status"), [("pass", 0), ("fail", 1), (None, 1)])
def test_a_sweep_whose_layouts_are_not_sound_says_so(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: str | None, status: int
) -> None:
    run = attempts.run_attempt

    def check_or_run(attempt: Attempt, *arguments: object, task: str = "train", **options: object) -> Outcome:
        if task == "verify" and parity is None:
            attempt.write_status("crashed", "rank 0: ValueError: broken")
            return Outcome("crashed", "rank 0: ValueError: broken")
        outcome = run(attempt, *arguments, **options)  # type: ignore[arg-type]
        if task == "verify":
            wrong = {"kind": "loss", "worst": "", "error": 1.0, "tolerance": 1e-5, "passed": parity == "pass"}
            write_json(attempt.result_file, {"parity": parity, "parity_max_error": 1.0, "comparisons": [wrong]})
        return outcome

    monkeypatch.setattr(attempts, "run_attempt", check_or_run)
    assert start("sweep", ["sweep.verify=true", "results_dir=res", "tracking.wandb.mode=disabled"]) == status


@pytest.mark.parametrize("name", ["2024", "a.b-c_d", "0x10", "1_000", "true1"])
def test_unusual_names_are_folders(start: Start, tmp_path: Path, name: str) -> None:
    assert start("sweep", [f"sweep.name={name}", "results_dir=res", "tracking.wandb.mode=disabled"]) == 0
    assert len(list((tmp_path / "res").glob("*/results.csv"))) == 1


def test_what_a_value_smuggles_in_is_kept_and_not_executed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "$(touch owned) 'x'.txt").write_text("It was the best of times. " * 100)
    path = """data.path="$(touch owned) 'x'.txt\""""
    assert start("sweep", [path, "results_dir=res", "tracking.wandb.mode=disabled"]) == 0
    with (tmp_path / "res" / "default" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    # The shell gives back what was typed: the command can be pasted.
    assert any(word.startswith("data.path=") and "$(touch owned)" in word for word in shlex.split(row["command"]))
    assert not list(tmp_path.rglob("owned"))


def damage(file: str, content: bytes | None) -> Callable[[Attempt], None]:
    def strike(attempt: Attempt) -> None:
        path = attempt.path / file
        path.unlink() if content is None else path.write_bytes(content)

    return strike


def fold(file: str) -> Callable[[Attempt], None]:
    """A folder in the place of a file: unreadable for root, too."""

    def strike(attempt: Attempt) -> None:
        (attempt.path / file).unlink()
        (attempt.path / file).mkdir()

    return strike


NO_NUMBER = "result.json is damaged: its row holds what is no number"


@pytest.mark.parametrize(
    ("strike", "status", "reason"),
    [
        (damage("result.json", None), "crashed", "result.json is missing or damaged"),
        (damage("result.json", b""), "crashed", "result.json is missing or damaged"),
        (damage("result.json", b'{"row": {"tok'), "crashed", "result.json is missing or damaged"),
        (damage("result.json", b"[1, 2]"), "crashed", "result.json is missing or damaged"),
        (damage("result.json", b"\xff\xfe\x00"), "crashed", "result.json is missing or damaged"),
        (damage("result.json", b'{"row": 3}'), "ok", ""),
        (damage("result.json", b'{"row": {"mfu": "abc"}}'), "crashed", NO_NUMBER),
        (damage("result.json", b'{"row": {"last_loss": {}}}'), "crashed", NO_NUMBER),
        (damage("result.json", b'{"row": {"step_seconds": 1.0, "tokens_per_second": null}}'), "ok", ""),
        (fold("result.json"), "crashed", "result.json is missing or damaged"),
        (damage("status.json", None), "interrupted", "status.json is missing or damaged"),
        (damage("status.json", b"{"), "interrupted", "status.json is missing or damaged"),
        (damage("status.json", b'{"reason": "x"}'), "interrupted", "status.json is missing or damaged"),
        (damage("status.json", b'{"status": "running", "pid": "x"}'), "interrupted", "the process that ran it is gone"),
        (damage("config.yaml", None), "ok", ""),
        (damage("config.yaml", b"a: [1"), "ok", ""),
        (damage("config.yaml", b"train: 3\nparallel: [x]\n"), "ok", ""),
        (damage("metrics.jsonl", b'{"step": 1\n\xff'), "ok", ""),
        (damage("command.txt", b"\xff\xfe"), "ok", ""),
        (damage("parity.json", b'{"parity": '), "ok", ""),
        (damage("wandb.json", b"null"), "ok", ""),
    ],
)
def test_a_damaged_file_is_one_row_and_costs_no_other(
    strike: Callable[[Attempt], None], status: str, reason: str, tmp_path: Path
) -> None:
    directory = SweepDirectory(tmp_path, "grid")
    record_attempt(directory, "parallel.tp=2")
    damaged = record_attempt(directory)
    strike(damaged)
    (directory.path / "points" / "a file").touch()
    (directory.path / "points" / "an empty folder").mkdir()
    rows = {row["point"]: row for row in report.write_report(directory)}
    assert len(rows) == 2
    row = rows.pop(damaged.point.name)
    assert (row["status"], row["reason"] or "") == (status, reason)
    (other,) = rows.values()
    assert other["status"] == "ok"
    assert other["rank"]


def test_a_row_of_an_unknown_layout_has_no_rank(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path, "grid")
    damaged = record_attempt(directory)
    damage("config.yaml", b"parallel: [1")(damaged)
    (row,) = report.write_report(directory)
    assert row["rank"] == ""
    sentence = f"{damaged.point.name} has no rank: its config.yaml is missing or damaged."
    assert sentence in (directory.path / "results.md").read_text()


@pytest.mark.parametrize("as_far_as", ["result.json", "result.partial.json"])
def test_a_measurement_stays_though_nobody_was_left_to_say_so(as_far_as: str, tmp_path: Path) -> None:
    """Everything was killed, or the disk was full, between the result and the status."""
    directory = SweepDirectory(tmp_path, "grid")
    attempt = record_attempt(directory)
    measured, now = attempt.result(), attempt.status()["environment"]
    attempt.result_file.rename(attempt.path / as_far_as)
    write_json(
        attempt.status_file,
        {key: value for key, value in attempt.status().items() if key != "ended"}
        | {"status": "running", "reason": None, "pid": 1, "pid_started": -1},
    )
    (row,) = report.write_report(directory)
    assert (row["status"], row["reason"], row["rank"]) == ("ok", None, "1")
    assert attempt.result() == measured
    assert decide(attempt.config(), attempt.point, now).action == "reuse"
    assert attempt.status()["ended"]


def test_failed_points_show_what_they_measured(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path, "grid")
    attempt = record_attempt(directory, status="oom", reason="rank 1: MemoryError")
    whole = record_attempt(directory, "parallel.tp=2")
    attempt.metrics_file.write_text((whole.metrics_file).read_text() + '{"step": 6, "tr')
    write_json(_made(attempt.error_file(1)), {"rank": 1, "peak_memory_bytes": 2**40})
    cut = record_attempt(directory, "parallel.pp=2", status="crashed", reason="x")
    strange = record_attempt(directory, "parallel.pp=4", status="crashed", reason="x")
    strange.metrics_file.write_text('{"step": 1}\n')
    rows = {row["point"]: row for row in report.collect(directory)}
    failed, good = rows[attempt.point.name], rows[whole.point.name]
    for column in ("step_seconds", "tokens_per_second", "first_loss", "last_loss", "bubble_fraction_measured"):
        assert failed[column] == pytest.approx(good[column])
    assert failed["peak_memory_bytes"] == 2**40
    assert (failed["mfu"], failed["gemm_utilization"]) == (None, None)
    assert rows[cut.point.name]["step_seconds"] is None  # warm-up
    assert rows[cut.point.name]["last_loss"] == pytest.approx(4.8)
    assert rows[strange.point.name]["last_loss"] is None


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def test_a_clock_that_jumps_loses_nothing(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["results_dir=res", "tracking.wandb.mode=disabled"]
    assert start("sweep", request) == 0
    (status,) = tmp_path.glob("res/default/points/*/attempt-1/status.json")
    content = json.loads(status.read_text())
    for started, ended in [("2099-01-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00"), (content["started"],) * 2]:
        status.write_text(json.dumps(content | {"started": started, "ended": ended}))
        os.utime(status, (0, 2**33))
        capsys.readouterr()
        assert start("sweep", [*request, "sweep.dry_run=true"]) == 0
        assert "1 points: 0 to run, 1 reused, 0 can't run" in capsys.readouterr().out
    for path in tmp_path.glob("res/default/points/*/attempt-*"):
        assert Point(path.parent).attempts() == [Attempt(path)]


def in_namespace(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script where mounts are private."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    preamble = "set -eu; mount --make-rprivate /\n"
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", preamble + script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"PYTHON": sys.executable, "LAUNCHERS": str(REPOSITORY / "launchers"), "DS_ACCELERATOR": "cpu"},
    )


def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "res").mkdir()
    done = in_namespace(
        'mount --bind res res; mount -o remount,ro,bind res; exec "$PYTHON" "$LAUNCHERS/sweep.py" results_dir=res',
        tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "results_dir='res' can't hold sweep 'default': Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_a_sentence_and_what_was_measured_stays(tmp_path: Path) -> None:
    small = "train.steps=3 train.warmup_steps=1 train.global_batch_size=1 train.sequence_length=8"
    done = in_namespace(
        f"""mkdir disk; mount -t tmpfs -o size=1m tmpfs disk
        mkdir -p disk/default/points; cp -r '{tmp_path}/kept' disk/default/points/
        head -c 2m /dev/zero > disk/filler || true
        status=0; "$PYTHON" "$LAUNCHERS/sweep.py" results_dir=disk tracking.wandb.mode=disabled {small} || status=$?
        cat disk/default/points/kept/attempt-1/result.json; exit $status""",
        _with_a_measurement(tmp_path),
    )
    assert done.returncode in (1, 2), done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert '"tokens_per_second": 1.0' in done.stdout


def _with_a_measurement(tmp_path: Path) -> Path:
    attempt = Point(tmp_path / "kept").new_attempt()
    write_json(attempt.result_file, {"row": {"tokens_per_second": 1.0}})
    attempt.write_status("ok")
    return tmp_path


def test_wandb_that_can_not_write_costs_a_warning(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "res" / "default").mkdir(parents=True)
    (tmp_path / "res" / "default" / "wandb").write_text("a file where wandb wants a folder")
    assert start("sweep", ["results_dir=res"]) == 0
    assert "warning: wandb is not complete" in capfd.readouterr().err
    assert (tmp_path / "res" / "default" / "results.csv").exists()
