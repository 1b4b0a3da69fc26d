"""Measure what the layers of a model take, before a run that asks for their seconds."""

from __future__ import annotations

from harness.errors import ConfigError
from harness.launch import attempts
from harness.launch.backends import backend_of
from harness.machine import Machine
from harness.record.store import SweepDirectory
from harness.spec.config import RunConfig
from harness.spec.identity import identity
from harness.spec.layer_seconds import probed_config

PROBED = "probe"
"""Folder of these measurements under results_dir."""


def measure_layers(config: RunConfig, machine: Machine) -> None:
    """Start the tensor-parallel ranks of a layout to measure its layers; some ten seconds, once for each kind of layer.

    Raises:
        ConfigError: they can't be measured.
    """
    probed = probed_config(config)
    backend_of(probed)
    sweep = SweepDirectory(probed.results_dir, PROBED)
    sweep.prepare()
    attempt = sweep.point(probed, identity(probed, "no data")).new_attempt()
    attempt.write_config(probed)
    attempt.write_status("pending", "it waits for its turn")
    print(f"measuring the layers of {config.model.name} with tp={config.parallel.tp}", flush=True)
    outcome = attempts.run_attempt(attempt, probed, machine, echo=False, task="probe")
    if outcome.status != "ok":
        raise ConfigError(
            f"the layers could not be measured ({outcome.status}: {outcome.reason}; log: {attempt.log_file}); give "
            "parallel.partition and parallel.schedule_seconds numbers, or leave them out"
        )
