"""launchers/sweep.py: a grid of points under one name, checked as a whole, then run.

Hydra's multirun drives it. The grid sweeper expands the request (`points.expand`), the launcher plugin hands the
complete batch to `run_batch`, which refuses what can't run, reuses what is measured already, and runs the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from harness.analyse.finish import Finishing, begin, finish, follow, print_warnings, replay
from harness.errors import ConfigError
from harness.launch import attempts
from harness.launch.backends import backend_of
from harness.launch.compose import Composer, environment_as_text, run_hydra
from harness.launch.points import Candidate, Run, check_points, decide_all, interleave, open_runs
from harness.launch.preview import print_preview
from harness.launch.verify import verify_layouts
from harness.machine import Machine, detect_machine
from harness.record.report import left_out, print_report, write_report
from harness.record.rows import point_row
from harness.record.sources import is_sound
from harness.record.store import Attempt, SweepDirectory, environment, read_json, this_process, write_json
from harness.secrets import refuse_typed_out
from harness.spec.checks import check_sweep_name
from harness.spec.config import REPOSITORY

# Flags that ask Hydra for something else than a multirun.
HYDRA_COMMANDS = frozenset(
    "--help -h --hydra-help --version --cfg -c --run -r --multirun -m --shell-completion -sc --info -i".split()
)


def main(argv: Sequence[str]) -> int:
    """Run a grid; the exit status."""
    statuses: list[str] = []

    def collect(batch: Any) -> None:
        """Hydra's task: our launcher hands it the statuses of its points."""
        if isinstance(batch, DictConfig):
            raise ConfigError("a point can't run inside Hydra's own launchers; leave hydra/launcher at shardwright")
        statuses.extend(batch)

    plugins = str(REPOSITORY / "launchers")
    if plugins not in sys.path:
        sys.path.append(plugins)
    if not HYDRA_COMMANDS & {argument.partition("=")[0] for argument in argv}:
        argv = ["-m", *argv]
    try:
        run_hydra(argv, "sweep", collect)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, say; what was measured is kept
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    if statuses and set(statuses) == {"invalid"}:
        return 2
    return int(not set(statuses) <= {"ok", "invalid", "pending"})


def sweep_directory(config: Mapping[str, Any]) -> SweepDirectory:
    """Where the sweep of a composed configuration lives.

    Raises:
        ConfigError: its name is not a folder's.
    """
    with environment_as_text():
        name = config["sweep"]["name"]
    name = str(name) if type(name) is int else name  # 2024
    check_sweep_name(name)
    return SweepDirectory(str(config["results_dir"] or REPOSITORY / "results"), name)


@dataclass(frozen=True)
class Measured:
    """What became of a point that was asked for."""

    overrides: tuple[str, ...]
    status: str
    """That of its runs, or `unverified`: measured, but without a passed parity check."""
    tokens_per_second: float = 0.0
    """0 where nothing counts: what a sweeper that searches is to maximize."""


def run_batch(
    batch: Sequence[Sequence[str]], composer: Composer, sweep: SweepDirectory, request: Mapping[str, Any], first: bool
) -> list[Measured]:
    """Check all points, run those that need it, and report; a failed point is a row, and the sweep goes on.

    Args:
        request: kept in sweep.yaml.
        first: nothing was run before; then a batch without a point that can run leaves no trace.

    Raises:
        ConfigError: the sweep's folder can't be written or belongs to a running sweep, or a secret is typed out.
        KeyboardInterrupt: stopped by a signal, after everything was ended and reported.
    """
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    refuse_typed_out(itertools.chain(*batch))  # here it ends the sweep, below it would be a row
    machine = detect_machine()
    candidates = check_points(batch, composer, machine)
    if first and not any(candidate.config for candidate in candidates):
        for reason in dict.fromkeys(candidate.reason for candidate in candidates):
            print(f"error: {reason}", file=sys.stderr)
        return [Measured(candidate.overrides, "invalid") for candidate in candidates]
    now = environment(machine)
    if any(candidate.config.sweep.dry_run for candidate in candidates if candidate.config):
        print_preview([*decide_all(candidates, sweep, now).values()], len(candidates), sweep, console)
        return [Measured(c.overrides, "pending" if c.config else "invalid") for c in candidates]
    with _alone(sweep):
        for backend in {backend_of(candidate.config) for candidate in candidates if candidate.config}:
            backend.end_leftovers(sweep.path)  # of an earlier process, if it was killed: they measured until now
        decisions = decide_all(candidates, sweep, now)
        points = [list(candidate.overrides) for candidate in candidates]
        sweep.prepare({**request, "points": points, "environment": now})
        print_preview([*decisions.values()], len(candidates), sweep, console)
        runs = open_runs(candidates, decisions, sweep)
        waiting = interleave([[run for run in repeats if not run.reused] for repeats in runs.values()])
        everything = list(itertools.chain(*runs.values()))
        stopped = verify_layouts(everything, sweep, machine, now, partial(_say, console))
        begun: list[Finishing] = []
        if not stopped:
            begun, stopped = run_all(waiting, machine, console)
        conclude(sweep, everything, begun, console)
    if stopped:
        _say(console, f"Stopped. To resume, run it again: python {shlex.join(sys.argv)}")
        raise KeyboardInterrupt
    return [_measured(candidate, runs.get(candidate.identity, [])) for candidate in candidates]


@contextlib.contextmanager
def _alone(sweep: SweepDirectory) -> Iterator[None]:
    """Keep a second process out of a sweep: the two would disturb each other's measurements."""
    sweep.prepare()
    owner = sweep.path / "running.json"
    folder = os.open(sweep.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = read_json(owner) or {}
            raise ConfigError(
                f"sweep.name={sweep.name} is running in process {first.get('pid', 'unknown')} on host "
                f"{first.get('host', 'unknown')}; wait for it, or choose another name"
            ) from None
        write_json(owner, this_process())
        yield
        owner.unlink(missing_ok=True)
    finally:
        os.close(folder)


def run_all(runs: Sequence[Run], machine: Machine, console: Console) -> tuple[list[Finishing], bool]:
    """Run all, `launch.slots` at once; the children that finish them, and whether a signal stopped it."""
    if not runs:
        return [], False
    shared = runs[0].config  # its backend and slots are those of all
    slots = backend_of(shared).share_out(machine, shared.launch.slots)
    begun: list[Finishing] = []
    began = time.monotonic()

    def run_one(number: int, share: Machine) -> None:
        run = runs[number]
        name = f"[{number + 1}/{len(runs)}] {run.attempt.point.name}"
        left = len(runs) - number - 1
        seconds_to_go = (time.monotonic() - began) / number * (left + 1) if number >= slots.count else None
        with _progress(console, f"{name} runs, {left} left{_to_go(seconds_to_go)}", live=slots.count == 1):
            following = follow(run.attempt, run.config)
            outcome = attempts.run_attempt(run.attempt, run.config, share, echo=False, received=received)
        begun.append(begin(run.attempt, following))
        _say(console, f"{name} {outcome.status}: {outcome.reason or _speed(run.attempt)}")
        if outcome.status == "interrupted" and not received:
            received.append(signal.SIGINT)

    waiting, running = deque(range(len(runs))), dict[Future[None], Machine]()
    with attempts.stop_signals() as received, ThreadPoolExecutor(slots.count) as pool:
        while running or (waiting and not received):
            while waiting and not received and (share := slots.take(runs[waiting[0]].config)):
                running[pool.submit(run_one, waiting.popleft(), share)] = share
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                slots.give_back(running.pop(done))
                done.result()
    for number in waiting:
        runs[number].attempt.write_status("interrupted", "the sweep was stopped before it started")
    return begun, bool(received)


def conclude(sweep: SweepDirectory, runs: Sequence[Run], begun: list[Finishing], console: Console) -> None:
    """Finish the runs, write and print the report, and say where everything is."""
    wandb = runs[0].config.tracking.wandb if runs else None
    wanted = wandb is not None and wandb.mode != "disabled"
    timeout = wandb.timeout_seconds if wandb else 0.0
    lost = [run.attempt.path for run in runs if run.reused and not run.attempt.wandb_run_id()]
    if wanted and lost:
        begun = [*begun, replay(lost)]
    warnings = [*finish(begun, timeout), *left_out(sweep)]
    rows = write_report(sweep)
    if wanted:
        warnings += finish([replay([sweep.path])], timeout)
    console.print()
    print_report(rows, console)
    folder = Path(os.path.relpath(sweep.path)) if sweep.path.is_relative_to(Path.cwd()) else sweep.path
    _say(console, f"\nResults: {folder}/results.csv and results.md; logs and metrics of each point: {folder}/points/")
    if offline := len(list(sweep.path.glob("wandb/offline-run-*"))):
        _say(console, f"wandb: {offline} offline runs")
        _say(console, f"  wandb leet {folder}/wandb                  shows them in the terminal")
        _say(console, f"  wandb sync {folder}/wandb/offline-run-*    uploads them")
    print_warnings(warnings)


def _measured(candidate: Candidate, runs: Sequence[Run]) -> Measured:
    if not runs:
        return Measured(candidate.overrides, "invalid")
    statuses = [run.attempt.status()["status"] for run in runs]
    row = point_row(runs[0].attempt.point) or {}
    status = next((status for status in statuses if status != "ok"), "ok")
    if status == "ok" and row and not is_sound(row):
        return Measured(candidate.overrides, "unverified")
    return Measured(candidate.overrides, status, float(row.get("tokens_per_second") or 0.0))


def _speed(attempt: Attempt) -> str:
    row = (attempt.result() or {}).get("row", {})
    return f"{row.get('tokens_per_second') or 0:,.0f} tokens/s"


def _progress(console: Console, line: str, live: bool) -> contextlib.AbstractContextManager[Any]:
    """A live line in a terminal, a plain one elsewhere."""
    if console.is_terminal and live:
        return console.status(Text(line))
    _say(console, line)
    return contextlib.nullcontext()


def _to_go(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f", about {seconds / 60:.0f} min to go" if seconds >= 90 else f", about {seconds:.0f} s to go"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
