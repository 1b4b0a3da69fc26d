"""Data parallelism as torch has it: `DistributedDataParallel` around the layers, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from harness.record.heartbeat import Phase
from harness.run.engines.torch.engine import TorchEngine, build_as, cross_entropy
from harness.spec.config import RunConfig


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> DataParallelEngine:
    """As `harness.run.engines.engine.build_engine`."""
    return build_as(DataParallelEngine, config, rank, weights, phase)


class DataParallelEngine(TorchEngine):
    """An `Engine` of replicas whose gradients are averaged while the last micro-batch's backward pass runs."""

    is_parallel = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.topology = self.config.parallel.topology
        # A static graph can't be combined with `no_sync`. Other sizes of buckets (5 to 200 MB) took as long.
        self._replica = DistributedDataParallel(self.model, process_group=self.group, gradient_as_bucket_view=True)

    @property
    def _num_micro_batches(self) -> int:
        return self.config.num_micro_batches

    def _place(self, number: int) -> tuple[int, int]:
        return number, self.rank

    def _count_valid(self) -> float:
        """Of all replicas, as a share of one: gradients are averaged."""
        valid = torch.tensor(super()._count_valid(), dtype=torch.float64, device=self.device)
        dist.all_reduce(valid, group=self.group)
        return float(valid) / self.config.parallel.dp

    def _forward(self, number: int) -> None:
        is_last = number + 1 == self._num_micro_batches
        with nullcontext() if is_last else self._replica.no_sync():  # decides for the backward pass as well
            super()._forward(number)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sums of token losses of a micro-batch, [sample]."""
        return cross_entropy(self._replica(tokens)[..., : self.config.model.vocab_size], targets)

    def _reduce_loss(self) -> None:
        dist.all_reduce(self._total, group=self.group)
        self._total = self._total.cpu() / self.config.parallel.dp
