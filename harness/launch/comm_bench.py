"""launchers/comm_bench.py: how fast do the groups of a layout communicate?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from harness.errors import ConfigError
from harness.launch import attempts
from harness.launch.single import run_single
from harness.machine import Machine
from harness.record.diagnose import exit_status
from harness.record.store import Attempt, write_atomically
from harness.spec.config import RunConfig
from harness.spec.identity import identity

BENCHED = "comm_bench"
"""Folder of communication benchmarks under results_dir."""


def main(argv: Sequence[str]) -> int:
    """Measure one layout; 0 when all was measured, 1 when that failed, 2 when it can't run."""

    def measure(attempt: Attempt, config: RunConfig, machine: Machine) -> int:
        write_atomically(attempt.command_file, shlex.join(["python", "launchers/comm_bench.py", *argv]) + "\n")
        return exit_status(attempt, attempts.run_attempt(attempt, config, machine, echo=True, task="comm_bench"))

    return run_single(argv, BENCHED, measure, _identify)


def _identify(config: RunConfig) -> str:
    if config.parallel.world_size == 1:
        raise ConfigError("one rank has nobody to talk to; use parallel.tp, parallel.pp or parallel.dp above 1")
    return identity(config, "no data")
