"""Found by ranks through PYTHONPATH: the seed of a run says how its rank 1 fails in the forward pass of step 3."""

from __future__ import annotations

import importlib.abc
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

MEMORY, HANG, CRASH = 7001, 7002, 7003
"""Values of train.seed."""


def misbehave(seed: int) -> None:
    if seed == MEMORY:
        import torch

        hoard = []
        while True:
            hoard.append(torch.ones(2**25))
    if seed == HANG:
        time.sleep(3600)
    if seed == CRASH:
        raise ValueError("broken on purpose")


class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "harness.run.heartbeat":  # DeepSpeed is there, and no engine yet
            sys.meta_path.remove(self)
            from deepspeed.runtime.pipe.engine import PipelineEngine
            from deepspeed.runtime.pipe.schedule import ForwardPass

            forward = PipelineEngine._INSTRUCTION_MAP[ForwardPass]
            config = next(Path(argument, "config.yaml") for argument in sys.argv if "attempt-" in argument)
            seed = re.search(r"^  seed: (\d+)", config.read_text(), re.MULTILINE)
            assert seed

            def sabotaged(engine: Any, **arguments: Any) -> None:
                if engine.global_steps == 2:
                    misbehave(int(seed[1]))
                forward(engine, **arguments)

            PipelineEngine._INSTRUCTION_MAP[ForwardPass] = sabotaged


if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Saboteur())
