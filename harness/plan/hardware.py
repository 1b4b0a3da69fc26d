"""Datasheet values of the device at hand, from the files of conf/cluster/."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from harness.config import REPOSITORY, Cluster, RunConfig
from harness.machine import Machine


def known_clusters() -> list[Cluster]:
    """All files of conf/cluster/."""
    files = sorted(Path(REPOSITORY, "conf", "cluster").glob("*.yaml"))
    return [Cluster.model_validate(OmegaConf.to_container(OmegaConf.load(file))) for file in files]


def peak_flops_per_second(config: RunConfig, machine: Machine) -> float | None:
    """Dense datasheet FLOP/s of one device of this machine in the run's precision; None where unknown."""
    for cluster in (config.cluster, *known_clusters()):
        if cluster.device_name == machine.device_name:
            return cluster.peak_flops[config.train.precision]
    return None
