"""One run from a command line: what the launchers of one layout share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from harness.errors import ConfigError
from harness.launch.compose import compose, plain, refuse_shape, run_hydra
from harness.launch.points import check_configuration, data_identity, new_attempt
from harness.machine import Machine, detect_machine
from harness.record.store import Attempt, SweepDirectory
from harness.spec.config import RunConfig


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
        config = check_configuration(raw, machine)
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


def compose_command_line(argv: Sequence[str]) -> dict[str, Any] | None:
    """The configuration that a command line asks for; None when Hydra only printed something.

    Raises:
        ConfigError: as `compose`, and for a multirun.
    """
    if any(argument == "-m" or argument.startswith("--m") for argument in argv):
        raise ConfigError("this launcher runs one layout; use launchers/sweep.py for several")
    if not any(argument.startswith("-") for argument in argv):
        return compose(argv)
    composed: list[DictConfig] = []
    run_hydra(argv, "config", composed.append)
    return refuse_shape(argv, plain(composed[0])) if composed else None
