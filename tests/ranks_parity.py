"""Rank program: parity of several configurations, one after the other in one process group."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from helpers import MACHINE, make_config

import harness.run.parity as parity
from harness.machine import Machine
from harness.run.engines.deepspeed.join import initialize_distributed

TINY = (
    "model.num_hidden_layers=3",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.vocab_size=67",
    "model.intermediate_size=48",
    "model.max_position_embeddings=16",
    "train.sequence_length=12",
)

GPUS = Machine("cuda", "test GPU", num_devices=8, num_cores=8, memory_bytes=8 * 2**30)


def machine_for(overrides: list[str]) -> Machine:
    """fp16 is refused on CPU, by DeepSpeed and so by the harness, though torch computes it there as well."""
    if "train.precision=fp16" not in overrides:
        return MACHINE
    get_accelerator().is_fp16_supported = lambda: True
    return GPUS


def run(argument: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    torch.set_num_threads(1)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    answers, num_threads = [], list[int]()
    parity.VARIANTS = tuple(v for v in parity.VARIANTS if argument["variant"] in ("", v.label))
    for overrides in argument["rows"]:
        config = make_config(*TINY, *overrides, machine=machine_for(overrides))
        comparisons = parity.check_parity(config, rank)
        answers.append([{**asdict(c), "passed": c.passed} for c in comparisons])
        num_threads.append(psutil.Process().num_threads())
    # gloo keeps three threads for each group; engines that were not freed would add up to many hundreds.
    assert num_threads[-1] - num_threads[0] < 150, num_threads
    return answers
