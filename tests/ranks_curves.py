"""Rank program: loss curves of several configurations on real text, one after the other in one process group."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from helpers import make_config

from harness.run.data import CorpusSamples, micro_batches
from harness.run.engines.deepspeed.build import build_training
from harness.run.tasks.train import share_corpus
from harness.run.worker import initialize_distributed


def run(argument: list[list[str]], folder: Path) -> list[list[float]]:
    torch.set_num_threads(1)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    curves = []
    for overrides in argument:
        config = make_config(*overrides)
        training = build_training(config, rank)
        samples = CorpusSamples(config, share_corpus(config, rank))
        data = micro_batches(config, samples, training.topology.coordinate(rank).dp)
        curves.append([float(training.engine.train_batch(data_iter=data)) for _ in range(config.train.steps)])
        training.destroy()
    return curves
