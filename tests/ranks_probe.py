"""Rank program: the seconds of the layers of several models, as later configurations find them, and by what library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from helpers import MACHINE, make_config

from harness.model.products import library
from harness.record.store import Attempt
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.tasks.probe import probe
from harness.spec.layer_seconds import probed_config, read_layer_seconds


def run(argument: list[list[str]], folder: Path) -> list[Any]:
    torch.set_num_threads(1)
    initialize_distributed()
    answers = []
    for number, overrides in enumerate(argument):
        attempt = Attempt(folder / f"attempt-{number}")
        attempt.path.mkdir(exist_ok=True)
        probe(attempt, probed_config(make_config(*overrides, machine=MACHINE)), int(os.environ["RANK"]))
        torch.distributed.barrier()
        answers.append({"seconds": vars(read_layer_seconds(attempt.result_file)), "products": library()})
    return answers
