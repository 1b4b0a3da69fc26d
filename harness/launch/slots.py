"""Which point runs where: devices, or cores on CPU, that points of a sweep running at once don't share."""

from __future__ import annotations

import os
from dataclasses import replace

from harness.machine import Machine
from harness.spec.config import RunConfig


class Slots:
    """Shares a machine out among up to `count` points at once."""

    def __init__(self, machine: Machine, count: int) -> None:
        self._machine, self.count = machine, count
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(machine.num_cores)
        self._all = machine.visible_devices if machine.device_kind == "cuda" else tuple(cores)[: machine.num_cores]
        self._free = list(self._all)
        self._taken = 0

    def take(self, config: RunConfig) -> Machine | None:
        """The machine with what a point gets of it as `visible_devices`; None while that is not free.

        A point that needs more than there is gets everything.
        """
        ranks = config.parallel.world_size
        need = ranks if self._machine.device_kind == "cuda" else ranks * config.launch.threads_per_rank
        need = min(need, len(self._all)) if self.count > 1 else len(self._all)
        if self._taken == self.count or len(self._free) < need:
            return None
        self._taken += 1
        share, self._free = self._free[:need], self._free[need:]
        return replace(self._machine, visible_devices=tuple(share))

    def give_back(self, share: Machine) -> None:
        """Free what `take` gave."""
        self._taken -= 1
        self._free = sorted([*self._free, *share.visible_devices])
