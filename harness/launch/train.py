"""launchers/train.py: one layout, started by `python`, or by the user's own `deepspeed`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.errors import ConfigError
from harness.launch.compose import compose, plain, run_hydra
from harness.machine import Machine, detect_machine
from harness.record.diagnose import exit_status
from harness.record.store import Attempt, SweepDirectory, environment, write_atomically
from harness.secrets import PLACES
from harness.spec.config import REPOSITORY, Data, RunConfig
from harness.spec.identity import identity
from harness.spec.resolve import load_config

if TYPE_CHECKING:
    from harness.corpus import Corpus
    from harness.record.diagnose import Outcome

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
RUNS = "runs"
"""Folder of single runs under results_dir."""


def main(argv: Sequence[str]) -> int:
    """Run one layout through `deepspeed`; the exit status."""
    return run_single(argv, RUNS, train)


def train(attempt: Attempt, config: RunConfig, machine: Machine) -> int:
    """Run an attempt, draw its pictures and mirror it to wandb; the exit status."""
    from harness.analyse.breakdown import draw_and_finish  # numpy, which --help can do without

    print(f"{config.model.name} {config.slug} m={config.num_micro_batches}: {attempt.path}", flush=True)
    outcome, mirror = run_and_mirror(attempt, config, machine, echo=True)
    draw_and_finish(attempt, mirror)
    result = attempt.result() or {}
    if result.keys() == {"row", "missing"}:  # the ranks were ended before they could say so
        print(
            f"warning: measured, but what result.json holds besides is missing: {'; '.join(result['missing'])}",
            file=sys.stderr,
        )
    return exit_status(attempt, outcome)


def run_single(
    argv: Sequence[str],
    folder: str,
    run: Callable[[Attempt, RunConfig, Machine], int],
    identify: Callable[[RunConfig], str] | None = None,
) -> int:
    """What a launcher of one run does: compose, check, make the folder of the run, and `run` it.

    Args:
        folder: under results_dir.
        run: with the attempt, its configuration and the machine; returns the exit status.
        identify: names the point and raises ConfigError for what can't run; default `data_identity`.

    Returns:
        The exit status: 2 for what can't run, 1 when it was interrupted or the disk takes no more.
    """
    try:
        raw = compose_command_line(argv)
        if raw is None:
            return 0
        machine = detect_machine()
        config = load_config(raw, machine)
        identity = (identify or data_identity)(config)
        return run(new_attempt(config, SweepDirectory(config.results_dir, folder), identity, argv), config, machine)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


def in_rank() -> bool:
    """Whether `deepspeed` started this process as one of its ranks."""
    return all(name in os.environ for name in RANK_VARIABLES)


def prepare(argv: Sequence[str], world_size: int) -> Path:
    """Compose and check what the user's own `deepspeed --num_gpus world_size` is to run; the attempt's folder.

    Raises:
        ConfigError: the configuration can't be run, or by another number of ranks.
    """
    overrides = without_local_rank(argv)
    try:
        raw = compose_command_line(overrides)
    except SystemExit:  # --help
        raw = None
    if raw is None:
        raise ConfigError(f"{' '.join(overrides)!r} prints and runs nothing; give it to `python launchers/train.py`")
    machine = detect_machine()
    config = load_config(raw, dataclasses.replace(machine, num_devices=world_size))
    parallel = config.parallel
    if parallel.world_size != world_size:
        pipeline = parallel.tp * parallel.pp
        other = f" or parallel.dp={world_size // pipeline}" if world_size % pipeline == 0 else ""
        raise ConfigError(
            f"parallel.tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp} needs {parallel.world_size} ranks, but "
            f"deepspeed started {world_size}; use --num_gpus {parallel.world_size}{other}"
        )
    attempt = new_attempt(config, SweepDirectory(config.results_dir, RUNS), data_identity(config), overrides)
    attempt.write_status("running", environment=environment(machine))
    return attempt.path


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop the argument that `deepspeed` adds for each rank, in both spellings."""
    return [argument for argument in argv if not argument.startswith(("--local_rank", "--local-rank"))]


def compose_command_line(argv: Sequence[str]) -> dict[str, Any] | None:
    """The configuration that a command line asks for; None when Hydra only printed something.

    Raises:
        ConfigError: as `compose`, and for a multirun.
    """
    if any(argument == "-m" or argument.startswith("--m") for argument in argv):
        raise ConfigError("launchers/train.py runs one layout; use launchers/sweep.py for several")
    if not any(argument.startswith("-") for argument in argv):
        return compose(argv)
    composed: list[DictConfig] = []
    run_hydra(argv, "config", composed.append)
    return plain(composed[0]) if composed else None


def data_identity(config: RunConfig, prepare: Callable[[Data, int, int], Corpus] | None = None) -> str:
    """Identity of the point, its data prepared.

    Args:
        prepare: stands in for `prepare_corpus`.

    Raises:
        ConfigError: the data can't be used.
    """
    from harness.corpus import prepare_corpus  # numpy

    length = config.train.sequence_length
    corpus = (prepare or prepare_corpus)(config.data, config.model.vocab_size, length)
    if config.train.eval_interval and corpus.path is not None and not corpus.ranges(length)[1]:
        raise ConfigError(
            f"the text has {corpus.num_tokens} tokens, too few to hold out one of two samples of "
            f"train.sequence_length={length}; give a longer text, or train.eval_interval=0"
        )
    return identity(config, corpus.fingerprint)


def new_attempt(config: RunConfig, sweep: SweepDirectory, identity: str, overrides: Sequence[str]) -> Attempt:
    """Make the folder of a run, with its configuration and the command that repeats it.

    Raises:
        ConfigError: it can't be written.
    """
    sweep.prepare()
    point = sweep.point(config, identity)
    attempt = next(filter(_never_started, point.attempts()), None) or point.new_attempt()
    attempt.write_config(config)
    write_atomically(attempt.command_file, repeat_command(overrides, config.parallel.world_size) + "\n")
    attempt.write_status("pending", "it waits for its turn")
    return attempt


def _never_started(attempt: Attempt) -> bool:
    return attempt.status()["status"] == "interrupted" and not attempt.log_file.exists()


def repeat_command(overrides: Sequence[str], world_size: int) -> str:
    """The `deepspeed` command, from the repository root, that runs a point again."""
    own = map(_from_root, own_overrides(overrides))
    return shlex.join(["deepspeed", "--num_gpus", str(world_size), "launchers/train.py", *own])


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that say nothing about a point."""
    return [override for override in overrides if not override.startswith("sweep.")]


def _from_root(override: str) -> str:
    """A path that was given from another folder, made absolute."""
    key, _, value = override.partition("=")
    path = Path(value)
    if key in PLACES and Path.cwd() != REPOSITORY and not path.is_absolute() and path.exists():
        return f"{key}={path.resolve()}"
    return override


def run_and_mirror(
    attempt: Attempt, config: RunConfig, machine: Machine, echo: bool, received: list[int] | None = None
) -> tuple[Outcome, subprocess.Popen[bytes] | None]:
    """As `run_attempt`, and start the child that mirrors it to wandb (with `tracking.live` as it begins)."""
    from harness.launch.process import run_attempt
    from harness.record.mirror import start_mirror

    mirror = None
    if config.tracking.live:
        attempt.write_status("running")
        mirror = start_mirror(attempt)
    outcome = run_attempt(attempt, config, machine, echo, received=received)
    return outcome, mirror or start_mirror(attempt)
