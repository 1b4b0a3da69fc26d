"""launchers/sweep.py: a grid of points under one name, checked as a whole, then run.

Hydra's multirun drives it. The grid sweeper expands the request (`expand`), the launcher plugin hands the
complete batch to `run_batch`, which refuses what can't run, reuses what is measured already, and runs the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from harness.analyse.breakdown import finish_pictures, start_pictures
from harness.errors import ConfigError
from harness.launch.compose import Composer, environment_as_text, open_deepspeed, run_hydra
from harness.launch.preview import Decision, decide, print_preview
from harness.launch.process import end_marked, stop_signals
from harness.launch.slots import Slots
from harness.launch.train import data_identity, new_attempt, own_overrides, run_and_mirror
from harness.launch.verify import verify_layouts
from harness.machine import Machine, detect_machine
from harness.record.mirror import finish_mirrors, start_mirrors
from harness.record.report import print_report, write_report
from harness.record.rows import point_row
from harness.record.sources import is_sound
from harness.record.store import Attempt, SweepDirectory, environment, read_json, this_process, write_json
from harness.secrets import TypedOut, refuse_typed_out
from harness.spec.checks import check_sweep_name
from harness.spec.config import REPOSITORY, RunConfig
from harness.spec.resolve import load_config

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from rich.console import Console

Mirror = subprocess.Popen[bytes] | None
"""A child that writes wandb runs."""

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


def expand(
    arguments: Sequence[str],
    params: Mapping[str, Any],
    points: Any,
    config_loader: ConfigLoader | None = None,
) -> list[list[str]]:
    """The overrides of every point: the product of all swept keys and the explicit points.

    Args:
        arguments: overrides, some with several values: a,b,c or choice(...), range(...), glob(...).
        params: further keys and their values (`hydra.sweeper.params`); `arguments` win.
        points: `sweep.points`, a list of strings of overrides.

    Raises:
        ConfigError: values that can't be enumerated, several of what all points share, or points of another form.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    axes: dict[str, list[list[str]]] = {}
    for override in parser.parse_overrides(open_deepspeed([*(f"{k}={v}" for k, v in params.items()), *arguments])):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [[str(override.input_line)]]
            continue
        if of_the_whole_sweep(key):
            raise ConfigError(f"{override.input_line}: all points of a sweep share {key}; give it one value")
        try:
            axes[key] = [[f"{key}={value}"] for value in override.sweep_string_iterator()]
        except HydraException:
            raise ConfigError(f"{override.input_line} has no countable values; list them: {key}=1,2,4") from None
    try:
        if isinstance(points, str):
            raise TypeError
        explicit = [shlex.split(point) for point in points] or [[]]
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"sweep.points={points} is no list of overrides; write sweep.points=['parallel.tp=2 parallel.pp=1','...']"
        ) from None
    for setting in itertools.chain(*explicit):
        if of_the_whole_sweep(setting.lstrip("+").partition("=")[0]):
            raise ConfigError(f"{setting} is no point's: all points of a sweep share it; put it beside sweep.points")
    return [list(itertools.chain(*choice)) for choice in itertools.product(*axes.values(), explicit)]


def of_the_whole_sweep(key: str) -> bool:
    """Whether a key of the configuration has one value in a sweep."""
    return key in ("launch.slots", "results_dir") or key.partition(".")[0] == "sweep"


@dataclass(frozen=True)
class Candidate:
    """A point that was asked for, and whether it can run."""

    overrides: tuple[str, ...]
    raw: dict[str, Any] | None = None
    """What was composed."""
    config: RunConfig | None = None
    """None: refused."""
    identity: str = ""
    reason: str = ""
    """Of the refusal, one sentence."""


def check_points(batch: Sequence[Sequence[str]], composer: Composer, machine: Machine) -> list[Candidate]:
    """Compose and check every point, its data included, before anything starts."""
    from harness.corpus import prepare_corpus

    prepare_once = cache(prepare_corpus)

    def check(overrides: tuple[str, ...]) -> Candidate:
        raw = None
        try:
            raw = composer.compose(overrides)
            config = load_config(raw, machine)
            identity = data_identity(config, prepare_once)
        except TypedOut:
            raise  # before the sweep leaves a trace
        except ConfigError as error:
            return Candidate(overrides, raw, reason=str(error))
        return Candidate(overrides, raw, config, identity)

    return [check(tuple(overrides)) for overrides in batch]


@dataclass(frozen=True)
class Measured:
    """What became of a point that was asked for."""

    overrides: tuple[str, ...]
    status: str
    """That of its runs, or `unverified`: measured, but without a passed parity check."""
    tokens_per_second: float = 0.0
    """0 where nothing counts: what a sweeper that searches is to maximize."""


@dataclass(frozen=True)
class Run:
    """An attempt that counts for a point."""

    config: RunConfig
    attempt: Attempt
    reused: bool
    """Measured earlier."""


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
    from rich.console import Console

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
        end_marked(sweep.path)  # what an earlier process left, if it and its guard were killed: it measured until now
        decisions = decide_all(candidates, sweep, now)
        points = [list(candidate.overrides) for candidate in candidates]
        sweep.prepare({**request, "points": points, "environment": now})
        print_preview([*decisions.values()], len(candidates), sweep, console)
        runs = open_runs(candidates, decisions, sweep)
        waiting = interleave([[run for run in repeats if not run.reused] for repeats in runs.values()])
        everything = list(itertools.chain(*runs.values()))
        stopped = verify_layouts(everything, sweep, machine, now, partial(_say, console))
        mirrors: list[Mirror] = []
        if not stopped:
            mirrors, stopped = run_all(waiting, machine, console)
        conclude(sweep, everything, mirrors, console)
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


def decide_all(candidates: Sequence[Candidate], sweep: SweepDirectory, now: Mapping[str, Any]) -> dict[Any, Decision]:
    """Identity of a point, or the overrides of one that can't run -> what becomes of it."""
    decisions: dict[Any, Decision] = {}
    for candidate in candidates:
        if candidate.config is None:
            decisions[candidate.overrides] = Decision("invalid", candidate.reason)
        elif candidate.identity not in decisions:
            point = sweep.point(candidate.config, candidate.identity)
            decisions[candidate.identity] = decide(candidate.config, point, now)
    return decisions


def open_runs(
    candidates: Sequence[Candidate], decisions: Mapping[Any, Decision], sweep: SweepDirectory
) -> dict[str, list[Run]]:
    """Identity -> runs of every point: those that count already, and new attempts.

    Points that can't run are recorded as such.
    """
    runs: dict[str, list[Run]] = {}
    for candidate in candidates:
        overrides, config = own_overrides(candidate.overrides), candidate.config
        if config is None:
            command = shlex.join(["python", "launchers/train.py", *overrides])
            sweep.record_invalid(overrides, candidate.raw, candidate.reason, command)
        elif candidate.identity not in runs:
            sweep.forget_invalid(overrides)
            decision = decisions[candidate.identity]
            new = [new_attempt(config, sweep, candidate.identity, overrides) for _ in range(decision.num_runs)]
            runs[candidate.identity] = [
                *(Run(config, attempt, reused=True) for attempt in decision.attempts),
                *(Run(config, attempt, reused=False) for attempt in new),
            ]
    return runs


def interleave(runs: Sequence[Sequence[Run]]) -> list[Run]:
    """All points once, then all again: what changes with time, changes every point alike."""
    return [run for again in itertools.zip_longest(*runs) for run in again if run is not None]


def run_all(runs: Sequence[Run], machine: Machine, console: Console) -> tuple[list[Mirror], bool]:
    """Run all, `launch.slots` at once; the children that mirror them to wandb, and whether a signal stopped it."""
    slots = Slots(machine, runs[0].config.launch.slots if runs else 1)
    mirrors: list[Mirror] = []
    pictures: list[Mirror] = []
    began = time.monotonic()

    def run_one(number: int, share: Machine) -> None:
        run = runs[number]
        name = f"[{number + 1}/{len(runs)}] {run.attempt.point.name}"
        left = len(runs) - number - 1
        seconds_to_go = (time.monotonic() - began) / number * (left + 1) if number >= slots.count else None
        with _progress(console, f"{name} runs, {left} left{_to_go(seconds_to_go)}", live=slots.count == 1):
            outcome, mirror = run_and_mirror(run.attempt, run.config, share, echo=False, received=received)
        mirrors.append(mirror)
        pictures.append(start_pictures(run.attempt))
        _say(console, f"{name} {outcome.status}: {outcome.reason or _speed(run.attempt)}")
        if outcome.status == "interrupted" and not received:
            received.append(signal.SIGINT)

    waiting, running = deque(range(len(runs))), dict[Future[None], Machine]()
    with stop_signals() as received, ThreadPoolExecutor(slots.count) as pool:
        while running or (waiting and not received):
            while waiting and not received and (share := slots.take(runs[waiting[0]].config)):
                running[pool.submit(run_one, waiting.popleft(), share)] = share
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                slots.give_back(running.pop(done))
                done.result()
    for number in waiting:
        runs[number].attempt.write_status("interrupted", "the sweep was stopped before it started")
    for warning in finish_pictures(pictures):
        print(f"warning: {warning}", file=sys.stderr)
    return mirrors, bool(received)


def conclude(sweep: SweepDirectory, runs: Sequence[Run], mirrors: list[Mirror], console: Console) -> None:
    """Collect the wandb runs, write and print the report, and say where everything is."""
    wandb = runs[0].config.tracking.wandb if runs else None
    wanted = wandb is not None and wandb.mode != "disabled"
    timeout = wandb.timeout_seconds if wandb else 0.0
    lost = [run.attempt.path for run in runs if run.reused and not run.attempt.wandb_run_id()]
    if wanted and lost:
        mirrors = [*mirrors, start_mirrors(lost)]
    warnings = finish_mirrors(mirrors, timeout)
    rows = write_report(sweep)
    if wanted:
        warnings += finish_mirrors([start_mirrors([sweep.path])], timeout)
    console.print()
    print_report(rows, console)
    folder = Path(os.path.relpath(sweep.path)) if sweep.path.is_relative_to(Path.cwd()) else sweep.path
    _say(console, f"\nResults: {folder}/results.csv and results.md; logs and metrics of each point: {folder}/points/")
    if offline := len(list(sweep.path.glob("wandb/offline-run-*"))):
        _say(console, f"wandb: {offline} offline runs")
        _say(console, f"  wandb leet {folder}/wandb                  shows them in the terminal")
        _say(console, f"  wandb sync {folder}/wandb/offline-run-*    uploads them")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


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
    from rich.text import Text

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
