"""Datasheet values of the device at hand, from the files of conf/cluster/."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from harness.machine import Machine
from harness.spec.config import REPOSITORY, Cluster, RunConfig
from harness.spec.resolve import first_problem

CONF = REPOSITORY / "conf"


def known_clusters() -> list[Cluster]:
    """What the files of conf/cluster/ describe; one that describes nothing is left out with a warning."""
    clusters = []
    for file in sorted(CONF.glob("cluster/*.yaml")):
        try:
            clusters.append(Cluster.model_validate(_content(file)))
        except Exception as error:  # of YAML, Hydra or the schema: whoever wrote the file may use another one
            reason = first_problem(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
            logging.getLogger(__name__).warning("%s is left out, it is no cluster: %s", file, reason)
    return clusters


def _content(file: Path) -> Any:
    """Plain containers of one file, and of those it builds on where it has a defaults list."""
    content = OmegaConf.load(file)
    if isinstance(content, DictConfig) and "defaults" in content:
        import hydra  # takes longer than all else here

        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            content = hydra.compose(f"cluster/{file.stem}").cluster
    return OmegaConf.to_container(content, resolve=True)


def peak_flops_per_second(config: RunConfig, machine: Machine) -> float | None:
    """Dense datasheet FLOP/s of one device of this machine in the run's precision; None where unknown.

    What the configured cluster gives comes first, where it means this machine: its device_name is null or part of the
    device's name. A name in a file of conf/cluster/ is one in full: an H200 NVL is slower than an H200.
    """
    known = known_clusters()
    given = [config.cluster] if _means(config.cluster.device_name, machine, known) else []
    here = [cluster for cluster in known if cluster.device_name == machine.device_name]
    peaks = (cluster.peak_flops.get(config.train.precision) for cluster in given + here)
    return next((peak for peak in peaks if peak is not None), None)


def unused_peak(config: RunConfig, machine: Machine) -> str | None:
    """A sentence, where a peak was given that no file holds, for another device than this machine's."""
    cluster, precision, known = config.cluster, config.train.precision, known_clusters()
    peak = cluster.peak_flops.get(precision)
    in_files = [other.peak_flops.get(precision) for other in known if other.device_name == cluster.device_name]
    if peak is None or _means(cluster.device_name, machine, known):
        return None
    if peak in in_files and (cluster.device_name or "").lower() not in machine.device_name.lower():
        return None  # its own file's: a cluster one does not have
    return (
        f"MFU by cluster.peak_flops.{precision}={peak:g}: that is of cluster.device_name={cluster.device_name}, and "
        f"this machine has {machine.device_name}; set cluster.device_name=null where it is meant"
    )


def _means(name: str | None, machine: Machine, known: list[Cluster]) -> bool:
    """Whether a cluster's device_name names this machine's device."""
    if name in [cluster.device_name for cluster in known]:
        return name in (None, machine.device_name)
    return name is None or name.lower() in machine.device_name.lower()
