"""Rank program: `logits`, of models that begin from weights in files; `runs`, trainings that do.

Rank 0 leaves the logits of each case as NAME.pt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import MACHINE, make_config
from torch import Tensor

import harness.run.tasks.train
from harness.record.store import Attempt, read_jsonl
from harness.run.data import MicroBatch
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.engines.engine import build_engine
from harness.spec.config import RunConfig


def run(argument: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    for name, overrides in argument["logits"]:
        logits = logits_of(make_config(*overrides, machine=MACHINE), rank)
        if rank == 0:
            torch.save(logits, folder / f"{name}.pt")
    curves = {}
    for name, overrides in argument["runs"]:
        attempt = Attempt(folder / name)
        attempt.path.mkdir(parents=True, exist_ok=True)
        harness.run.tasks.train.train(attempt, make_config(*overrides), rank)
        curves[name] = read_jsonl(attempt.metrics_file) if rank == 0 else []
    return curves


def tokens_of(vocab_size: int, batch: int, sequence: int) -> Tensor:
    """[batch, sequence], the same wherever they are asked for."""
    return torch.randint(vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(7))


def logits_of(config: RunConfig, rank: int) -> Tensor | None:
    """[batch, sequence, vocabulary] on rank 0, of one micro-batch; a collective call."""
    engine: Any = build_engine(config, rank)
    module = engine._engine.module
    found: list[Tensor] = []
    loss = module.loss_fn

    def look(logits: Tensor, labels: Any) -> Tensor:
        found.append(logits.detach().clone())
        return loss(logits, labels)  # type: ignore[no-any-return]

    module.loss_fn = look
    tokens = tokens_of(config.model.vocab_size, config.train.micro_batch_size, config.train.sequence_length)

    def data() -> Iterator[MicroBatch]:
        yield tokens, (tokens, torch.tensor(1.0))

    engine.evaluate(data(), 1)
    ranks: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(found[0] if found else None, ranks, dst=0)
    topology = engine.topology
    engine.destroy()
    if ranks is None:
        return None
    (last, *_) = [group for group in topology.groups("tp") if ranks[group[0]] is not None]
    return torch.cat([ranks[member] for member in last], dim=-1)[..., : config.model.vocab_size]
