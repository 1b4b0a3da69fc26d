"""Found by ranks through PYTHONPATH: the seed of a run says how its rank 1 fails, and when."""

from __future__ import annotations

import importlib.abc
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

MEMORY, HANG, CRASH, KILLED, HANG_EARLY = 7001, 7002, 7003, 7004, 7005
"""Values of train.seed: in the forward pass of step 3, but the last while it imports its task."""


def misbehave(seed: int) -> None:
    if seed == MEMORY:
        import torch

        hoard = []
        while True:
            hoard.append(torch.ones(2**25))
    if seed in (HANG, HANG_EARLY):
        time.sleep(3600)
    if seed == CRASH:
        os.write(2, b"rank 1 says so below Python\n")
        raise ValueError("broken on purpose")
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)


def read_seed() -> int:
    """From the attempt's folder, or from the overrides where the user started deepspeed."""
    folder = next((argument for argument in sys.argv if "attempt-" in argument), None)
    text = Path(folder, "config.yaml").read_text() if folder else "\n".join(sys.argv)
    seed = re.search(r"^(?:  seed: |train\.seed=)(\d+)", text, re.MULTILINE)
    assert seed
    return int(seed[1])


class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "harness.run.engines.engine" and read_seed() == HANG_EARLY:
            misbehave(HANG_EARLY)
        if name == "harness.run.instruments.heartbeat":  # DeepSpeed is there, and no engine yet
            sys.meta_path.remove(self)
            from harness.run.engines.engine import Observers

            execute, seed, steps = Observers.execute, read_seed(), itertools.count(1)

            def sabotaged(observers: Any, instruction: Any, act: Any) -> Any:
                def misbehaving() -> Any:
                    misbehave(seed)
                    return act()

                begins = (instruction.kind, instruction.micro_batch, instruction.chunk) == ("forward", 0, 0)
                return execute(observers, instruction, misbehaving if begins and next(steps) == 3 else act)

            Observers.execute = sabotaged


if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Saboteur())
