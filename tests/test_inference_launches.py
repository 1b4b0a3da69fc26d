"""Sweeps of inference, the user's own `deepspeed` and launchers/verify.py: real launches of small models."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import free_port
from helpers import agree

from harness.record.store import Attempt, read_jsonl
from harness.run.inference.requests import arrival_seconds
from harness.spec.config import REPOSITORY, Generate

pytestmark = pytest.mark.slow

LAUNCHERS = REPOSITORY / "launchers"
QUIET = ["tracking.wandb.mode=disabled", "launch.threads_per_rank=1"]
STAGES = 4
SECONDS = 0.05
"""Of a pass through a stage."""
HANG_SECONDS = 7.0
WAITING = "generate.batch_size=2 generate.num_requests=6 generate.max_new_tokens=3 generate.repeats=1"


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    given = [str(argument) for argument in command]
    return subprocess.run(given, cwd=folder, capture_output=True, text=True, timeout=400)


def long_pause() -> str:
    """Two requests at a rate, the second of which comes after launch.hang_seconds have passed."""
    for seed in itertools.count():
        first, second = arrival_seconds(Generate(request_rate=0.1, seed=seed), 2)
        if first < 1 and HANG_SECONDS + 1 < second - first < HANG_SECONDS + 3:
            return f"generate.request_rate=0.1 generate.seed={seed} generate.num_requests=2 generate.repeats=1"
    raise AssertionError


def points() -> list[str]:
    return [
        f"task=generate parallel.pp={STAGES} generate.batch_size=4 generate.max_new_tokens=9 generate.repeats=2",
        f"task=forward parallel.pp={STAGES} train.global_batch_size=4 train.steps=5 train.warmup_steps=2",
        *(f"task=generate {WAITING} generate.request_rate={rate}" for rate in (2, 20)),
        f"task=generate generate.max_new_tokens=2 {long_pause()} launch.hang_seconds={HANG_SECONDS}",
        f"task=generate {WAITING} generate.request_rate=20 generate.num_groups=3",
    ]


def sweep(folder: Path) -> tuple[str, list[dict[str, str]]]:
    """Its output and its rows, in the order of `points`."""
    waits = ["model=emulated", f"model.num_hidden_layers={STAGES}", f"model.forward_seconds={SECONDS}"]
    shape = ["train.sequence_length=16", "train.micro_batch_size=1", "generate.prompt_length=16"]
    request = [*waits, *shape, *QUIET, f"sweep.points={points()}", f"results_dir={folder}", "sweep.name=inference"]
    done = run(folder, sys.executable, LAUNCHERS / "sweep.py", *request)
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "inference" / "results.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == len(points())
    given = [set(point.split()) for point in points()]
    return done.stdout, [next(row for row in rows if point <= {*row["command"].split()}) for point in given]


def test_a_sweep_of_inference(tmp_path_factory: pytest.TempPathFactory) -> None:
    agree(lambda _: check_sweep(tmp_path_factory.mktemp("sweep")))


def check_sweep(folder: Path) -> None:
    output, (ring, passes, slow, fast, paused, refused) = sweep(folder)
    assert [row["status"] for row in (ring, passes, slow, fast, paused, refused)] == ["ok"] * 5 + ["invalid"], output
    assert "generate.num_groups=3 exceeds generate.batch_size=2; use 2 or less" in refused["reason"]

    decode, fill = (STAGES - 1) / (8 * STAGES + STAGES - 1), (STAGES - 1) / (2 * STAGES - 1)
    for row, name, ideal in (
        (ring, "prefill_bubble_fraction", fill),
        (ring, "decode_bubble_fraction", decode),
        (passes, "bubble_fraction", fill),
    ):
        found = {kind: float(row[f"{name}_{kind}"]) for kind in ("ideal", "simulated", "measured")}
        assert found["ideal"] == pytest.approx(ideal, abs=1e-9), name
        assert found["measured"] == pytest.approx(found["simulated"], abs=0.02), name
        assert found["measured"] == pytest.approx(ideal, abs=0.03), name

    one_pass = STAGES * SECONDS
    for row in (slow, fast, paused):
        assert float(row["time_to_first_token_seconds_p99"]) >= float(row["queue_seconds_p99"]) >= 0
        assert float(row["time_to_first_token_seconds"]) >= one_pass
        assert float(row["queue_seconds_p50"]) <= float(row["queue_seconds_p99"])
    # Six requests of three passes each, two at a time: at 20 in a second, nearly all come while the first are served.
    assert float(fast["queue_seconds_p99"]) > 4 * one_pass
    assert float(slow["queue_seconds_p50"]) < 2 * one_pass
    assert float(slow["time_to_first_token_seconds_p99"]) < float(fast["time_to_first_token_seconds_p99"])
    assert float(paused["generation_seconds"]) > HANG_SECONDS

    before = {path: path.read_bytes() for path in folder.rglob("result.json")}
    again, _ = sweep(folder)
    assert "6 points: 0 to run, 5 reused, 1 can't run" in again
    assert {path: path.read_bytes() for path in folder.rglob("result.json")} == before


def test_the_users_own_deepspeed_generates(tmp_path: Path) -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_gpus", 2, "--master_port", free_port(), LAUNCHERS / "train.py", "task=generate"]
    wanted = ["parallel.pp=2", "model=gpt2_tiny", "generate.max_new_tokens=4", "generate.prompt='a b, c'"]
    done = run(tmp_path, *command, *wanted, *QUIET, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("runs/points/*/attempt-1")
    (line,) = read_jsonl(Attempt(path).generated_file)
    assert (line["prompt"], len(line["tokens"]), line["finish_reason"]) == ("a b, c", 4, "length")
    assert Attempt(path).status()["status"] == "ok"
    assert "tokens/s generated" in done.stdout
    refused = run(tmp_path, *command, *wanted, "generate.output=out.jsonl")
    assert refused.returncode == 2
    assert refused.stderr.count("error: generate.output='out.jsonl' is written by launchers/generate.py alone") == 1


def test_generation_is_verified(tmp_path: Path) -> None:
    wanted = ["task=generate", "parallel.pp=2", "model=gpt2_tiny", f"results_dir={tmp_path}", *QUIET]
    done = run(tmp_path, sys.executable, LAUNCHERS / "verify.py", *wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: pass" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["verify"]
