"""Rank program: loss curves of several configurations on real text, one after the other in one process group."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from helpers import make_config

from harness.run.data import CorpusSamples, micro_batches
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.engines.engine import build_engine
from harness.run.tasks.train import share_corpus


def run(argument: list[list[str]], folder: Path) -> list[list[float]]:
    torch.set_num_threads(1)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    curves = []
    for overrides in argument:
        config = make_config(*overrides)
        engine = build_engine(config, rank)
        samples = CorpusSamples(config, share_corpus(config, rank))
        data = micro_batches(config, samples, engine.topology.coordinate(rank).dp)
        curves.append([engine.train_step(data) for _ in range(config.train.steps)])
        engine.destroy()
    return curves
