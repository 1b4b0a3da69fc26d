"""The process groups of tensor parallelism, as a handle that layers get as an argument."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from harness.spec.topology import Topology


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer.

    A group is None where there is nobody to talk to; the collectives then do nothing.
    """

    group: ProcessGroup | None
    """All tensor-parallel ranks."""
    rank: int
    size: int
    kv_group: ProcessGroup | None
    """Neighbours that own fractions of one key-value head, when there are fewer heads than ranks."""
    kv_size: int
    sequence_parallel: bool = False
    """Between attention and feed-forward layers each rank holds 1/size of the sequence (arXiv 2205.05198)."""

    @classmethod
    def single(cls) -> TensorParallel:
        """One rank, no communication."""
        return cls(group=None, rank=0, size=1, kv_group=None, kv_size=1)

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
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> TensorParallel:
    """The groups of `rank`; every rank of the topology calls this at the same time.

    Args:
        group: this rank's tensor-parallel group if there is one already, else it is created.
        sequence_parallel: without effect on one rank.
    """
    size = topology.tp
    if size == 1:
        return TensorParallel.single()
    if group is None:
        group = create_groups(topology.groups("tp"), rank)
    kv_size = max(1, size // num_key_value_heads)
    kv_group = None
    if kv_size == size:
        kv_group = group
    elif kv_size > 1:
        kv_group = create_groups(topology.tp_subgroups(kv_size), rank)
    return TensorParallel(group, topology.coordinate(rank).tp, size, kv_group, kv_size, sequence_parallel)


def create_groups(members: list[list[int]], rank: int) -> ProcessGroup:
    """Create every group of `members`, a collective call, and return the one `rank` belongs to."""
    created = [dist.new_group(ranks) for ranks in members]
    (own,) = [group for group, ranks in zip(created, members, strict=True) if rank in ranks]
    assert isinstance(own, ProcessGroup)
    return own
