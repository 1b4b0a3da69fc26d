"""launchers/train.py: one layout, started by `python`, or by the user's own `deepspeed`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.analyse.finish import finish_now, follow
from harness.errors import ConfigError
from harness.launch import attempts
from harness.launch.points import check_configuration, new_attempt, unattended_identity
from harness.launch.single import compose_command_line, run_single
from harness.machine import Machine, detect_machine
from harness.record.diagnose import exit_status
from harness.record.store import Attempt, SweepDirectory, environment
from harness.spec.config import RunConfig

RUNS = "runs"
"""Folder of single runs under results_dir."""


def main(argv: Sequence[str]) -> int:
    """Run one layout through `deepspeed`; the exit status."""
    return run_single(argv, RUNS, train, unattended_identity)


def train(attempt: Attempt, config: RunConfig, machine: Machine) -> int:
    """Run an attempt, draw its pictures and mirror it to wandb; the exit status."""
    print(f"{config.model.name} {config.slug} m={config.num_micro_batches}: {attempt.path}", flush=True)
    following = follow(attempt, config)
    outcome = attempts.run_attempt(attempt, config, machine, echo=True)
    finish_now(attempt, following)
    result = attempt.result() or {}
    if result.keys() == {"row", "missing"}:  # the ranks were ended before they could say so
        print(
            f"warning: measured, but what result.json holds besides is missing: {'; '.join(result['missing'])}",
            file=sys.stderr,
        )
    return exit_status(attempt, outcome)


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
    config = check_configuration(raw, dataclasses.replace(machine, num_devices=world_size), may_measure=False)
    parallel = config.parallel
    if parallel.world_size != world_size:
        pipeline = parallel.tp * parallel.pp
        other = f" or parallel.dp={world_size // pipeline}" if world_size % pipeline == 0 else ""
        raise ConfigError(
            f"parallel.tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp} needs {parallel.world_size} ranks, but "
            f"deepspeed started {world_size}; use --num_gpus {parallel.world_size}{other}"
        )
    attempt = new_attempt(config, SweepDirectory(config.results_dir, RUNS), unattended_identity(config), overrides)
    attempt.write_status("running", environment=environment(machine))
    return attempt.path


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop the argument that `deepspeed` adds for each rank, in both spellings."""
    return [argument for argument in argv if not argument.startswith(("--local_rank", "--local-rank"))]
