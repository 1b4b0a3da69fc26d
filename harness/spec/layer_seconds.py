"""What the layers of a model take on this machine, as `parallel.partition=measured` and
`parallel.schedule_seconds=measured` use it.

`harness.run.tasks.probe` measures it, with the layout's tensor-parallel ranks, and keeps it in the user's cache; here
is where, and what follows from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.machine import Machine, cache_file
from harness.spec.config import RunConfig

MEASURED = "measured"
"""What keys say whose numbers come from here."""


class NotMeasured(ConfigError):
    """The numbers that a configuration asks for are not there yet.

    Args:
        config: with neutral values in their place.
    """

    def __init__(self, keys: str, config: RunConfig) -> None:
        super().__init__(
            f"{keys}: the layers of this model were not measured on this machine yet; python launchers/train.py and "
            "sweep.py do that first"
        )
        self.config = config


@dataclass(frozen=True)
class LayerSeconds:
    """Seconds of one micro-batch on one rank: forward, input half and weight half of backward."""

    embedding: tuple[float, float, float]
    block: tuple[float, float, float]
    head: tuple[float, float, float]
    """What comes after the blocks, and the loss."""

    def of_parts(self, layers_per_part: list[int]) -> list[list[float]]:
        """The same of every part of the model, in its order."""
        last = len(layers_per_part) - 1
        return [
            [layers * self.block[k] + self.embedding[k] * (part == 0) + self.head[k] * (part == last) for k in range(3)]
            for part, layers in enumerate(layers_per_part)
        ]


def probed_config(config: RunConfig) -> RunConfig:
    """What is measured for a run: a small model of the same layers, on its tensor-parallel ranks."""
    parallel, train = config.parallel, config.train
    alone = {
        "pp": 1, "dp": 1, "schedule": "1f1b", "num_chunks": 1, "schedule_memory": None, "schedule_passes": None,
        "schedule_seconds": None, "partition": "uniform", "zero_stage": 0,
    }  # fmt: skip
    model = config.model.model_copy(update={"num_hidden_layers": 1, "weights": None})
    if hasattr(model, "stage_factors"):
        model = model.model_copy(update={"stage_factors": None})
    step = {"global_batch_size": train.micro_batch_size, "resume": None, "checkpoint_interval": 0, "eval_interval": 0}
    return config.model_copy(
        update={
            "model": model,
            "parallel": parallel.model_copy(update=alone),
            "train": train.model_copy(update=step),
            "deepspeed": {},
        }
    )


def layer_seconds_file(config: RunConfig, machine: Machine) -> Path:
    """Where what was measured for a run is kept."""
    probed = probed_config(config)
    train = ("micro_batch_size", "sequence_length", "precision", "activation_checkpointing")
    content = {
        "model": probed.model.model_dump(exclude={"name", "initializer_range", "weights"}),
        "tp": probed.parallel.tp,
        "sequence_parallel": probed.parallel.sequence_parallel,
        "threads": probed.launch.threads_per_rank,
        **{key: getattr(probed.train, key) for key in train},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return cache_file("layers", machine, digest)


def read_layer_seconds(file: Path) -> LayerSeconds | None:
    """What was measured; None where nothing was, or the file is damaged."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        return LayerSeconds(*(_three(content[layer]) for layer in ("embedding", "block", "head")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _three(values: Any) -> tuple[float, float, float]:
    forward, input_half, weight_half = map(float, values)
    if not all(0 <= value < math.inf for value in (forward, input_half, weight_half)):
        raise ValueError(f"{values} are no durations")
    return forward, input_half, weight_half


def as_json(seconds: LayerSeconds) -> dict[str, Any]:
    """Content of the file."""
    return asdict(seconds)
