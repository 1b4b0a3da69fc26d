"""launchers/comm_bench.py: how fast do the groups of a layout communicate?"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from harness.config import identity, load_config
from harness.errors import ConfigError
from harness.launch.train import compose_command_line, new_attempt
from harness.machine import detect_machine
from harness.record.store import SweepDirectory, write_atomically

BENCHED = "comm_bench"
"""Folder of communication benchmarks under results_dir."""


def main(argv: Sequence[str]) -> int:
    """Measure one layout; 0 when all was measured, 1 when that failed, 2 when it can't run."""
    try:
        raw = compose_command_line(argv)
        if raw is None:
            return 0
        machine = detect_machine()
        config = load_config(raw, machine)
        if config.parallel.world_size == 1:
            raise ConfigError("one rank has nobody to talk to; use parallel.tp, parallel.pp or parallel.dp above 1")
        attempt = new_attempt(config, SweepDirectory(config.results_dir, BENCHED), identity(config, "no data"), argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(attempt.command_file, shlex.join(["python", "launchers/comm_bench.py", *argv]) + "\n")
    from harness.launch.process import run_attempt

    outcome = run_attempt(attempt, config, machine, echo=True, task="comm_bench")
    if outcome.status != "ok":
        print(f"{outcome.status}: {outcome.reason}\nlog: {attempt.log_file}", file=sys.stderr)
        return 1
    return 0
