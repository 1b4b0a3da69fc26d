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
    """Dense datasheet FLOP/s of one device of this machine in the run's precision; None where unknown.

    What the configured cluster gives comes first, where it means this machine: its device_name is null or part of the
    device's name. A file of conf/cluster/ has to name the device in full: an H200 NVL is slower than an H200.
    """
    given = [config.cluster] if (config.cluster.device_name or "") in machine.device_name else []
    known = [cluster for cluster in known_clusters() if cluster.device_name == machine.device_name]
    peaks = (cluster.peak_flops.get(config.train.precision) for cluster in given + known)
    return next((peak for peak in peaks if peak is not None), None)
