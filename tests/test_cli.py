"""The command line as people type it: exit statuses, one sentence per mistake, nothing left behind."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import free_port

from harness.errors import ConfigError
from harness.launch import rank, sweep, train, verify
from harness.machine import process_started
from harness.record.heartbeat import describe, read_heartbeats
from harness.record.store import Attempt
from harness.spec.config import REPOSITORY

LAUNCHERS = REPOSITORY / "launchers"
SABOTAGE = Path(__file__).parent / "sabotage"
QUICK = "train.steps=3 train.warmup_steps=1 train.global_batch_size=2 train.sequence_length=16".split()
RUN = [*QUICK, "tracking.wandb.mode=disabled"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a launcher in an empty folder, with a file called `taken` in it."""
    (tmp_path / "taken").touch()

    def start(launcher: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(LAUNCHERS / launcher), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | environment
        )

    return start


MAIN = {"train.py": train.main, "verify.py": verify.main, "sweep.py": sweep.main}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """As `run`, in this process."""
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)

    def start(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [launcher, *arguments])
        status: Any
        try:
            status = MAIN[launcher](list(arguments))
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(arguments, status or 0, *capsys.readouterr())

    return start


@pytest.mark.parametrize(
    ("launcher", "arguments", "sentence"),
    [
        ("train.py", "train.stepz=3", "did you mean train.steps?"),
        ("train.py", "parallel.tp=two", "parallel.tp='two' is not valid"),
        ("train.py", "parallel.tp=3", "can't be split over parallel.tp=3; use tp 1, 2, 4 or 8"),
        ("train.py", "data.path=missing.txt", "data.path='missing.txt' does not exist"),
        ("train.py", "results_dir=taken", "set results_dir to a folder you can write to"),
        ("train.py", "-m parallel.tp=1,2", "use launchers/sweep.py"),
        ("train.py", "train.global_batch_size=4096 parallel.dp=4096", "needs 4096 ranks"),
        ("train.py", "--cfg job model=nope", "model=nope is not available; choose one of"),
        ("train.py", "--nope", "unrecognized arguments"),
        ("verify.py", "parallel.tp=3", "can't be split over parallel.tp=3; use tp 1, 2, 4 or 8"),
        ("sweep.py", "parallel.tp=1,2 train.stepz=3", "did you mean train.steps?"),
        ("sweep.py", "train.stepz=1,2", "did you mean train.steps?"),
        ("sweep.py", "parallel.tp=3,6 parallel.pp=1,2", "can't be split over parallel.tp=6"),
        ("sweep.py", "sweep.name=a/b parallel.tp=1,2", "sweep.name='a/b' is not a folder name"),
        ("sweep.py", "sweep.name=../a -m", "sweep.name='../a' is not a folder name"),
        ("sweep.py", "results_dir=taken", "set results_dir to a folder you can write to"),
        ("sweep.py", "sweep.points=['parallel.pp=99']", "parallel.pp=99 stages exceed"),
        ("sweep.py", "hydra/sweeper=basic sweep.name=.a parallel.tp=1,2", "sweep.name='.a' is not a folder name"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(
    call: Run, tmp_path: Path, launcher: str, arguments: str, sentence: str
) -> None:
    done = call(launcher, *arguments.split())
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    if "usage:" not in done.stderr:
        assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("launcher", MAIN)
def test_a_launcher_ends_with_the_status(run: Run, launcher: str) -> None:
    done = run(launcher, "train.stepz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.stepz is not a configuration key")


@pytest.mark.parametrize("launcher", ["train.py", "sweep.py"])
def test_flags_of_hydra_are_answered(run: Run, call: Run, tmp_path: Path, launcher: str) -> None:
    helped, shown = run(launcher, "--help"), call(launcher, "--cfg", "job", "train.steps=77")
    assert (helped.returncode, shown.returncode) == (0, 0)
    assert "deepspeed --num_gpus N launchers/train.py" in helped.stdout
    assert "steps: 77" in shown.stdout
    assert helped.stderr + shown.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_configuration_folder_of_the_user(call: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("defaults: [gpt2_tiny, _self_]\nhidden_size: 24\n")
    for launcher in ("train.py", "sweep.py"):
        done = call(launcher, "--config-dir", "mine", "model=own", "parallel.tp=3")
        assert done.returncode == 2
        assert "model.num_attention_heads=8 can't be split over parallel.tp=3" in done.stderr


def test_a_sweep_runs_reports_and_is_reused(run: Run, tmp_path: Path) -> None:
    request = ["parallel.tp=1,3", "results_dir=res", "sweep.name=small", *RUN]
    first = run("sweep.py", *request)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[1/1] tp1_pp1_dp1_mbs1" in first.stdout
    with (tmp_path / "res" / "small" / "results.csv").open() as file:
        rows = {row["status"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"ok", "invalid"}
    assert float(rows["ok"]["tokens_per_second"]) > 0
    assert rows["ok"]["command"].startswith("deepspeed --num_gpus 1 launchers/train.py parallel.tp=1 results_dir=")
    again = run("sweep.py", *request)
    assert again.returncode == 0
    assert "2 points: 0 to run, 1 reused, 1 can't run" in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["res", "taken"]


VERIFY = "parallel.tp=2 model=llama_tiny train.activation_checkpointing=full results_dir=res".split()
COMPARED = {
    "AdamW": ["loss", "gradient", "gradient norm", *(f"{state} after 2 steps" for state in ("update", "exp_avg"))],
    "SGD": ["loss", "gradient", "gradient norm", "update after 3 steps"],
    "SGD, clipped": ["loss", "gradient", "gradient norm", "update after 3 steps"],
}


def test_verify_says_what_it_compared(run: Run, tmp_path: Path) -> None:
    done = run("verify.py", *VERIFY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: pass" in done.stdout
    assert "FAIL" not in done.stdout
    for label, kinds in COMPARED.items():
        assert all(f" {label}: {kind} " in done.stdout for kind in kinds), done.stdout
    assert "model.num_hidden_layers 4 -> 2" in done.stdout
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("res/verify/points/*/attempt-1/result.json"))
    assert (result["parity"], len(result["comparisons"])) == ("pass", 14)
    assert 0 < result["parity_max_error"] <= 1e-5


NO_REDUCTION = """
import importlib.abc, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "harness.run.engines.engine":
            sys.meta_path.remove(self)
            import harness.model.layers
            layers = harness.model.layers
            layers.copied_linear = lambda hidden, weight, bias, group, later: layers.linear(hidden, weight, bias, later)

if "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_verify_names_a_mismatch_and_exits_1(run: Run, tmp_path: Path) -> None:
    """Without Megatron's f, gradients are not summed over tensor-parallel ranks; the loss is right."""
    (tmp_path / "sitecustomize.py").write_text(NO_REDUCTION)
    done = run("verify.py", *VERIFY, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "parity: fail" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert any("AdamW: gradient " in line and "FAIL" in line for line in lines), done.stdout
    assert any("AdamW: loss" in line and "ok" in line for line in lines), done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_with_its_ranks(tmp_path: Path) -> None:
    request = ["parallel.dp=1,2", f"results_dir={tmp_path}", "sweep.name=long", *RUN, "train.steps=100000"]
    sweep = subprocess.Popen(
        [sys.executable, str(LAUNCHERS / "sweep.py"), *request],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells make background jobs ignore it
    )
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("long/points/*/attempt-1/metrics.jsonl")):
            assert time.monotonic() < deadline
            assert sweep.poll() is None
            time.sleep(0.1)
        ranks = psutil.Process(sweep.pid).children(recursive=True)
        sweep.send_signal(signal.SIGINT)
        output, errors = sweep.communicate(timeout=60)
    finally:
        sweep.kill()  # its guard ends the ranks
    assert sweep.returncode == 1, output + errors
    assert "Traceback" not in errors
    assert "To resume, run it again: python" in output
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    statuses = [json.loads(path.read_text())["status"] for path in tmp_path.glob("long/points/*/attempt-1/status.json")]
    assert statuses == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_the_users_own_deepspeed_is_refused_what_can_not_run(tmp_path: Path) -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_gpus", "1", "--master_port", str(free_port()), LAUNCHERS / "train.py", "parallel.tp=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    sentence = "parallel.tp=2 x pp=1 x dp=1 needs 2 ranks, but deepspeed started 1; use --num_gpus 2"
    assert done.stderr.count(f"error: {sentence}\n") == 1
    assert list(tmp_path.iterdir()) == []


class UserStarted:
    """A run of two ranks under the user's own `deepspeed`, sabotaged as its seed says."""

    def __init__(self, folder: Path, seed: int, *overrides: str) -> None:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--num_gpus", "2", "--master_port", str(free_port())]
        command += [LAUNCHERS / "train.py", "parallel.pp=2"]
        request = [*RUN, "data=synthetic", f"results_dir={folder}", f"train.seed={seed}", *overrides]
        memory_limit = (1_600_000_000, resource.getrlimit(resource.RLIMIT_DATA)[1])

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, memory_limit)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells make background jobs ignore it

        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "launch.threads_per_rank=1", *request],
            env=os.environ | {"PYTHONPATH": str(SABOTAGE), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=(folder / "output.txt").open("w"),
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Once the first step is done."""
        deadline = time.monotonic() + 200
        while not any(path.read_text() for path in self.folder.glob("runs/points/*/attempt-1/metrics.jsonl")):
            assert time.monotonic() < deadline, (self.folder / "output.txt").read_text()
            time.sleep(0.1)
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in everyone if p.name() != "tee" and "RANK" in p.environ()]

    def stands(self) -> str:
        """Where its ranks are."""
        return describe(read_heartbeats(next(self.folder.glob("runs/points/*/attempt-1"))), 2)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> Attempt:
        """The attempt it leaves."""
        try:
            self.process.wait(200)
        finally:
            self.kill()
        return Attempt(next(self.folder.glob("runs/points/*/attempt-1")))


@pytest.mark.slow
def test_the_users_own_deepspeed_run_out_of_memory_is_named(tmp_path: Path) -> None:
    run = UserStarted(tmp_path, 7001, "launch.hang_seconds=3000")
    attempt = run.end()
    status = attempt.status()
    assert (run.process.returncode, status["status"]) == (1, "oom")
    assert status["reason"].startswith("rank 1: ")
    assert "memory" in status["reason"]
    assert "its peak so far: " in status["reason"]
    assert status["ranks_stood"]["1"] == "in forward of micro-batch 0, step 3"
    log = attempt.log_file.read_text()
    assert log.count("step 1/3") == 1  # rank 0's, once
    assert log.count("in misbehave\n") == 1  # rank 1's traceback
    assert f"oom: {status['reason']}\n" in log
    assert set(log.splitlines()) <= set((tmp_path / "output.txt").read_text().splitlines())


ENDS = [
    (7003, "", "crashed", "rank 1: ValueError: broken on purpose"),
    (7004, "", "crashed", "rank 1 ended without a word; (rank 0: RuntimeError: |deepspeed ended the others by)"),
    (1, "kill rank 0", "crashed", "rank 0 ended without a word; (rank 1: RuntimeError: |deepspeed ended the)"),
    (7002, "kill rank 0", "crashed", "rank 0 ended without a word; deepspeed ended the others by SIGTERM"),
    (1, "Ctrl-C", "interrupted", "stopped by SIGINT before it finished"),
    (7002, "SIGTERM", "interrupted", "stopped by SIGTERM before it finished"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], UserStarted]:
    """Runs for all of ENDS, three at a time: imports take most of the time."""
    runs = {}
    for batch in (ENDS[:3], ENDS[3:]):
        for seed, act, *_ in batch:
            endless = ["train.steps=100000"] if act else []
            runs[seed, act] = UserStarted(tmp_path_factory.mktemp("run"), seed, *endless)
        with ThreadPoolExecutor() as pool:
            for end in [pool.submit(strike_and_end, runs[seed, act], seed, act) for seed, act, *_ in batch]:
                end.result()
    return runs


def strike_and_end(run: UserStarted, seed: int, act: str) -> None:
    try:
        if act:
            strike(run, seed, act)
        run.end()
    finally:
        run.kill()


def strike(run: UserStarted, seed: int, act: str) -> None:
    """Do something to a run that trains, and wait for its ranks to end."""
    deadline = time.monotonic() + 400
    ranks = run.ranks()
    assert len(ranks) == 2
    launch = ranks[0].parent()
    time.sleep(1.0)
    while seed == 7002 and "rank 1 in forward of micro-batch 0, step 3" not in run.stands():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if act == "Ctrl-C":
        os.killpg(run.process.pid, signal.SIGINT)
    elif act == "SIGTERM":
        assert launch
        launch.terminate()
    else:
        next(rank for rank in ranks if rank.environ()["RANK"] == act[-1]).kill()
    deadline = time.monotonic() + 30
    while any(process_started(rank.pid) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "act", "status", "reason"), ENDS)
def test_how_the_users_own_deepspeed_run_ended(
    ended: dict[tuple[int, str], UserStarted], seed: int, act: str, status: str, reason: str
) -> None:
    run = ended[seed, act]
    attempt = run.end()
    found = attempt.status()
    output = (run.folder / "output.txt").read_text()
    assert (found["status"], bool(re.match(reason, found["reason"]))) == (status, True), output
    assert ("rank 1 says so below Python" in attempt.log_file.read_text()) == (seed == 7003)


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_ranks_do_not_wait_for_one_that_prints_help(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ConfigError, match="prints and runs nothing"):
        train.prepare(flags, world_size=2)


def test_a_layout_for_the_ranks_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Call me Ishmael. " * 100)
    overrides = ["--local_rank=0", "parallel.dp=fill", "parallel.tp=2", "results_dir=res", "data.path=text", *QUICK]
    attempt = train.prepare([*overrides, "--local-rank=0"], world_size=4)
    assert attempt.parts[:2] == ("res", "runs")
    assert attempt.parent.name.startswith("tp2_pp1_dp2_mbs1_")
    assert (attempt / "command.txt").read_text() == (
        "deepspeed --num_gpus 4 launchers/train.py parallel.dp=fill parallel.tp=2 "
        f"results_dir={tmp_path}/res data.path={tmp_path}/text {' '.join(QUICK)}\n"
    )


def test_ranks_are_told_from_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in rank.RANK_VARIABLES:
        assert not rank.in_rank()
        monkeypatch.setenv(name, "0")
    assert rank.in_rank()
    assert "RANK" in os.environ
