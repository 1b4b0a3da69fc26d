"""Sweeps that are killed, starved and broken, and lose nothing: real processes, real signals."""

from __future__ import annotations

import csv
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from harness.launch.backends import local
from harness.launch.backends.local import GRACE_SECONDS, MARK, end_marked, reserve_port
from harness.record.store import Point, SweepDirectory, read_json
from harness.spec.config import REPOSITORY

SABOTAGE = Path(__file__).parent / "sabotage"
TINY = "train.steps=4 train.warmup_steps=1 train.global_batch_size=2 train.sequence_length=16 train.precision=fp32"
FIXED = [*TINY.split(), "tracking.wandb.mode=disabled", "launch.threads_per_rank=1"]

VICTIMS = {
    "rank": "harness.run.worker",
    "launch.py": "deepspeed.launcher.launch",
    "runner": "deepspeed.launcher.runner",
    "guard": "guard.py",
}
"""What is killed -> what its command line holds, the most inclusive last."""
LAYOUTS = ["parallel.pp=2 parallel.schedule=zb_v", "parallel.tp=2 model.compile=true"]
"""Of what is killed: messages and sums through shared memory, compiled blocks and others."""


def start_sweep(folder: Path, *overrides: str, python_path: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "launchers" / "sweep.py"), *FIXED, *overrides]
    command += [f"results_dir={folder}", "sweep.name=chaos"]
    environment = os.environ | {"PYTHONPATH": python_path}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, text=True, cwd=folder)


def marked(folder: Path) -> dict[str, list[psutil.Process]]:
    """Living processes of the attempts in a folder, by their part."""
    found: dict[str, list[psutil.Process]] = {part: [] for part in VICTIMS}
    for candidate in local.marked(folder):
        try:
            line = " ".join(candidate.cmdline())
        except psutil.Error:
            continue
        part = next((part for part in reversed(VICTIMS) if VICTIMS[part] in line), "rank")
        found[part].append(candidate)
    return found


def remaining(folder: Path, seconds: float) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := list(itertools.chain(*marked(folder).values()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def results(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("chaos/points/*/attempt-*/result.json")}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "chaos" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def has_begun(folder: Path, since: float) -> bool:
    """Whether a sweep started since then has ended what earlier ones left: after that it writes sweep.yaml."""
    request = folder / "chaos" / "sweep.yaml"
    return request.exists() and request.stat().st_mtime > since


def strike(folder: Path, sweep: subprocess.Popen[str], since: float, part: str, rng: random.Random) -> bool:
    """Kill one part of a sweep that runs since then, at a random moment; whether it came to that."""
    kind = "guard" if part == "sweep and guard" else part
    while kind in VICTIMS and sweep.poll() is None and not marked(folder)[kind]:
        time.sleep(0.1)
    if part == "sweep":  # what an earlier one left, killed with its guard, is this one's to end
        while sweep.poll() is None and not has_begun(folder, since):
            time.sleep(0.1)
    time.sleep(rng.uniform(0.0, 4.0))
    victims = marked(folder)[kind] if kind in VICTIMS else []
    if sweep.poll() is not None or (kind in VICTIMS and not victims):
        return False
    for victim in victims and [rng.choice(victims)]:
        victim.kill()
    if part.startswith("sweep"):
        sweep.kill()
        sweep.wait()
    if part == "sweep":
        assert remaining(folder, GRACE_SECONDS + 3) == []
    return True


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_any_of_its_processes(tmp_path: Path) -> None:
    rng, measured = random.Random(5), dict[Path, bytes]()
    plan = [*VICTIMS, "sweep", "sweep and guard"] * 2
    rng.shuffle(plan)
    for start in itertools.count():
        num_seeds = 1 + start // 6  # the grid grows meanwhile
        grid = [
            f"sweep.points={LAYOUTS}",
            f"train.seed=range(0,{num_seeds})",
            "sweep.retry=[crashed]",
        ]
        since, sweep = time.time(), start_sweep(tmp_path, *grid)
        while plan and sweep.poll() is None:
            if strike(tmp_path, sweep, since, plan[-1], rng):
                plan.pop()
        status = sweep.wait(300)
        now = results(tmp_path)
        assert {path: now.get(path) for path in measured} == measured, "a result was lost"
        assert len({path.parents[1] for path in now}) == len(now), "a measured point ran again"
        measured = now
        if not plan and status == 0:
            break
    assert remaining(tmp_path, 1) == []
    table = rows(tmp_path)
    assert {row["status"] for row in table} == {"ok"}
    assert len({row["point"] for row in table}) == len(table) == len(LAYOUTS) * num_seeds
    for point in SweepDirectory(tmp_path, "chaos").points():
        assert [attempt.status()["status"] for attempt in point.attempts()].count("ok") == 1, point
    assert start_sweep(tmp_path, *grid, "sweep.dry_run=true").wait(60) == 0
    assert f"{len(table)} points: 0 to run, {len(table)} reused, 0 can't run" in (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_each_failure_has_its_name_and_the_others_are_measured(tmp_path: Path) -> None:
    limits = ["launch.hang_seconds=15.0", "launch.memory_limit_bytes=3000000000", "parallel.pp=2"]
    limits += ["parallel.schedule=interleaved"]
    grid = "train.seed=1,7001,7002,7003,2"
    sweep = start_sweep(tmp_path, grid, *limits, python_path=str(SABOTAGE))
    assert sweep.wait(300) == 1, (tmp_path / "output.txt").read_text()
    assert remaining(tmp_path, 1) == []
    table = {row["command"].partition("train.seed=")[2].split()[0]: row for row in rows(tmp_path)}
    assert {seed: row["status"] for seed, row in table.items()} == {
        "1": "ok", "2": "ok", "7001": "oom", "7002": "hang", "7003": "crashed",
    }  # fmt: skip
    assert table["7003"]["reason"] == "rank 1: ValueError: broken on purpose"
    assert table["7001"]["reason"].startswith("rank 1: ")
    assert "its peak so far: " in table["7001"]["reason"]
    assert "rank 1 in forward of micro-batch 0, chunk 0, step 3" in table["7002"]["reason"]
    assert "rank 0 in recv_activation of micro-batch 0, chunk 1, step 3" in table["7002"]["reason"]
    for seed in ("7001", "7002", "7003"):  # two steps were done, one of them timed
        assert float(table[seed]["step_seconds"]) > 0
        assert float(table[seed]["last_loss"]) > 0
    assert float(table["7001"]["peak_memory_bytes"]) > 2 * float(table["1"]["peak_memory_bytes"])
    attempt = next(p for p in SweepDirectory(tmp_path, "chaos").points() if p.name == table["7002"]["point"])
    assert set((read_json(attempt.attempts()[0].status_file) or {})["ranks_stood"]) == {"0", "1"}


@pytest.mark.slow
def test_a_killed_rank_ends_every_fast_path_alike(tmp_path: Path) -> None:
    """In its third step, while the others wait for it in whatever way: they end, and nothing stays."""
    paths = [
        "parallel.tp=2",
        "parallel.tp=2 parallel.sequence_parallel=true parallel.shared_memory=false",
        "parallel.tp=2 model.compile=true model.onednn=true",
        "parallel.pp=2 parallel.schedule=zb_v",
        "parallel.pp=2 parallel.shared_memory=false",
        "parallel.dp=2",
        "parallel.pp=2 parallel.engine=torch parallel.schedule=zb_v",
        "parallel.tp=2 parallel.engine=dtensor",
        "parallel.dp=2 parallel.engine=ddp",
    ]
    began = time.monotonic()
    sweep = start_sweep(tmp_path, f"sweep.points={paths}", "train.seed=7004", python_path=str(SABOTAGE))
    assert sweep.wait(400) == 1, (tmp_path / "output.txt").read_text()
    assert remaining(tmp_path, 1) == []
    table = rows(tmp_path)
    assert len(table) == len(paths)
    for row in table:
        assert row["status"] == "crashed", row
        assert row["reason"].startswith(("rank 1 was ended by SIGKILL", "rank 1 ended without a word; ")), row
        assert float(row["step_seconds"]) > 0
    assert time.monotonic() - began < 30 * len(paths)  # nobody waited for a time-out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train.py", "verify.py", "comm_bench.py"])
def test_a_hang_before_the_work_begins_is_a_hang(tmp_path: Path, launcher: str) -> None:
    limits = ["launch.hang_seconds=20.0", "launch.timeout_seconds=120.0", "parallel.pp=2", "data=synthetic"]
    command = [sys.executable, REPOSITORY / "launchers" / launcher, *FIXED, *limits, "train.seed=7005"]
    environment = os.environ | {"PYTHONPATH": str(SABOTAGE)}
    done = subprocess.run(
        [*command, f"results_dir={tmp_path}"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "hang: no progress for launch.hang_seconds=20; " in done.stderr
    task = launcher.removesuffix(".py")
    assert re.search(rf"ranks? (0 and )?1 in importing harness\.run\.tasks\.{task}\b", done.stderr), done.stderr
    assert remaining(tmp_path, 1) == []


@pytest.mark.slow
def test_two_sweeps_at_once_share_no_port(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    sweeps = []
    for folder in folders:
        folder.mkdir()
        sweeps.append(start_sweep(folder, "train.seed=range(0,3)"))
    ports: dict[str, str] = {}
    while any(sweep.poll() is None for sweep in sweeps):
        running: dict[str, str] = {}
        for folder in folders:
            for runner in marked(folder)["runner"]:
                with suppress(psutil.Error, StopIteration):
                    words = runner.cmdline()
                    attempt = next(word for word in words if "attempt-" in word)
                    running[attempt] = words[words.index("--master_port") + 1]
        assert len(set(running.values())) == len(running), running
        ports |= running
        time.sleep(0.1)
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    assert len(ports) == 6


def test_ports_are_shared_with_nobody() -> None:
    code = (
        "from harness.launch.backends.local import reserve_port\n"
        "with reserve_port() as port: print(port, flush=True); input()"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         cwd=REPOSITORY)
        for _ in range(2)
    ]  # fmt: skip
    with ExitStack() as stack:
        ports = [stack.enter_context(reserve_port()) for _ in range(20)]
        ports += [int(other.stdout.readline()) for other in others if other.stdout]
        assert len(set(ports)) == 22
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", ports[0]))  # as the rank 0 of its owner does
        for other in others:
            other.communicate("\n")


def test_the_last_free_port_goes_to_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserve_port() as one, reserve_port() as another:
        ports = [one, another]
    monkeypatch.setattr(local, "PORTS", ports)
    with reserve_port() as first, reserve_port() as second:
        assert {first, second} == {*ports}
        with pytest.raises(OSError, match=f"no port from {ports[0]} to {ports[1]} is free"), reserve_port():
            pass
    with ThreadPoolExecutor(2) as pool, reserve_port() as taken:

        def other(_: int) -> int | None:
            try:
                with reserve_port() as port:
                    time.sleep(0.2)
                    return port
            except OSError:
                return None

        assert {port for port in pool.map(other, range(2)) if port} == {*ports} - {taken}


def test_a_killed_guard_leaves_nothing(tmp_path: Path) -> None:
    """What it guarded is found by its mark."""
    code = "import os, time; os.setsid() if os.fork() == 0 else None; time.sleep(600)"
    folder = Point(tmp_path / "point").new_attempt().path
    command = [sys.executable, "-I", "-S", local.GUARD, "1", "", "", sys.executable, "-c", code]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {MARK: str(folder)})
    deadline = time.monotonic() + 20
    while len(local.marked(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    guard.kill()
    assert guard.wait() == -signal.SIGKILL
    assert len(local.marked(folder)) == 2
    end_marked(tmp_path)
    assert local.marked(folder) == set()
