"""The process groups of tensor parallelism, as a handle that layers get as an argument.

With it they get `Parts`, by which whoever measures learns what happens inside a forward or backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup

from harness.model.weight_gradients import WeightGradients
from harness.spec.topology import Topology


class PartObserver(Protocol):
    """Is told what happens inside an instruction, on the rank that does it."""

    def part_began(self, kind: str) -> None:
        """A collective or a recomputation begins: a kind of `harness.spans.span.NESTED_KINDS`."""

    def part_ended(self, kind: str) -> None:
        """The one that began last is done."""


class Parts:
    """Tells observers of the parts of an instruction; costs nothing without any."""

    def __init__(self) -> None:
        self.observers: list[PartObserver] = []

    def part(self, kind: str) -> AbstractContextManager[None]:
        """Something of a kind happens inside."""
        return self._told(kind) if self.observers else nullcontext()

    @contextmanager
    def _told(self, kind: str) -> Iterator[None]:
        for observer in self.observers:
            observer.part_began(kind)
        try:
            yield
        finally:  # a recomputation ends by an exception once everything needed is there
            for observer in self.observers:
                observer.part_ended(kind)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What `torch.utils.checkpoint` does the first and the second computation in."""
        return nullcontext(), self.part("recompute")


@dataclass(frozen=True)
class Group:
    """Ranks that communicate inside a layer."""

    process_group: ProcessGroup
    parts: Parts = field(default_factory=Parts)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.process_group.size()


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer.

    A group is None where there is nobody to talk to; the collectives then do nothing.
    """

    group: Group | None
    """All tensor-parallel ranks."""
    rank: int
    size: int
    kv_group: Group | None
    """Neighbours that own fractions of one key-value head, when there are fewer heads than ranks."""
    kv_size: int
    sequence_parallel: bool = False
    """Between attention and feed-forward layers each rank holds 1/size of the sequence (arXiv 2205.05198)."""
    parts: Parts = field(default_factory=Parts, compare=False)
    """What all layers tell of what they do inside a pass."""
    later: WeightGradients | None = field(default=None, compare=False)
    """Where all layers leave the second half of their backward passes; None: they are not split."""

    @classmethod
    def single(cls, later: WeightGradients | None = None) -> TensorParallel:
        """One rank, no communication."""
        return cls(group=None, rank=0, size=1, kv_group=None, kv_size=1, later=later)

    @property
    def slice_rank(self) -> int | None:
        """Which slice of the sequence this rank holds between layers; None: all of it, as the others do."""
        return self.rank if self.sequence_parallel else None

    def share(self, size: int) -> int:
        """This rank's part of a dimension of `size`."""
        assert size % self.size == 0, f"{size} can't be split over {self.size} ranks"
        return size // self.size


def build_tensor_parallel(
    topology: Topology,
    rank: int,
    num_key_value_heads: int,
    group: Group | None = None,
    sequence_parallel: bool = False,
    later: WeightGradients | None = None,
) -> TensorParallel:
    """The groups of `rank`; every rank of the topology calls this at the same time.

    Args:
        group: this rank's tensor-parallel group if there is one already, else it is created.
        sequence_parallel: without effect on one rank.
        later: where layers leave the gradients of weights; None: they compute them at once.
    """
    size = topology.tp
    if size == 1:
        return TensorParallel.single(later)
    if group is None:
        group = Group(create_groups(topology.groups("tp"), rank))
    kv_size = max(1, size // num_key_value_heads)
    kv_group = None
    if kv_size == size:
        kv_group = group
    elif kv_size > 1:
        kv_group = Group(create_groups(topology.tp_subgroups(kv_size), rank), group.parts)
    tp_rank = topology.coordinate(rank).tp
    return TensorParallel(group, tp_rank, size, kv_group, kv_size, sequence_parallel, group.parts, later)


def create_groups(members: list[list[int]], rank: int, backend: str | None = None) -> ProcessGroup:
    """Create every group of `members`, a collective call, and return the one `rank` belongs to.

    Args:
        backend: None: that of the group of all ranks.
    """
    created = [dist.new_group(ranks, backend=backend) for ranks in members]
    (own,) = [group for group, ranks in zip(created, members, strict=True) if rank in ranks]
    assert isinstance(own, ProcessGroup)
    return own
