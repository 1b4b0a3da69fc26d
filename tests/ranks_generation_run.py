"""Rank program of test_generation_run.py: measurements of a generation on emulated stages."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from helpers import MACHINE, make_config

from harness.record.heartbeat import Heart
from harness.record.store import Attempt
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.inference.generation import Generation, share_requests


def run(argument: list[str], folder: Path) -> list[dict[str, Any]]:
    """Records of three measurements, with the passes of the last phase."""
    initialize_distributed()
    rank = int(os.environ["RANK"])
    config = make_config("task=generate", *argument, machine=MACHINE)
    requests, _ = share_requests(config, rank)
    found = []
    with mock.patch("harness.run.inference.meter.peak_memory_bytes", return_value=1000 + rank):
        generation = Generation(Attempt(folder), config, rank, requests, MACHINE, Heart(folder, rank))
        for _ in range(3):
            before = generation.ring.num_passes
            record = generation.run(None)
            passes = [i for i in generation.ring.executed if i.kind == "forward"]
            all_passes = generation.ring.num_passes - before
            found.append(
                {"decode": len(passes), "prefill": all_passes - len(passes)} | {"record": record and asdict(record)}
            )
    return found
