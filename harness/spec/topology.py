"""Which rank is which: rank <-> (pp, dp, tp) coordinates and the groups along each axis.

Ranks are numbered like DeepSpeed's `PipeModelDataParallelTopology`: tensor-parallel ranks are
neighbours, then data-parallel replicas, then pipeline stages, so that the axis with the most
communication stays inside a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

Axis = Literal["pp", "dp", "tp"]
T = TypeVar("T")


class Coordinate(NamedTuple):
    """Place of a rank in the layout."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """A grid of pp x dp x tp ranks."""

    pp: int
    dp: int
    tp: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    def rank(self, pp: int = 0, dp: int = 0, tp: int = 0) -> int:
        """Rank at a coordinate."""
        return (pp * self.dp + dp) * self.tp + tp

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a rank."""
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Coordinate(pp, dp, tp)

    def groups(self, axis: Axis) -> list[list[int]]:
        """Ranks that differ only along `axis`, one list per group, in order of their first rank."""
        members: dict[Coordinate, list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(self.coordinate(rank)._replace(**{axis: 0}), []).append(rank)
        return list(members.values())

    def arranged(self, of_ranks: Sequence[T]) -> list[list[list[T]]]:
        """What is given by rank, by [replica][stage][tensor-parallel rank]."""
        stages, neighbours = range(self.pp), range(self.tp)
        return [[[of_ranks[self.rank(pp, dp, tp)] for tp in neighbours] for pp in stages] for dp in range(self.dp)]

    def pipelines(self) -> list[list[int]]:
        """Ranks that pass micro-batches to each other, by stage: a list for each replica and tensor-parallel rank."""
        return self.groups("pp")

    def stages(self) -> list[list[int]]:
        """Ranks of each stage."""
        size = self.dp * self.tp
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    def tp_subgroups(self, size: int) -> list[list[int]]:
        """Runs of `size` neighbours inside each tensor-parallel group."""
        return [group[i : i + size] for group in self.groups("tp") for i in range(0, self.tp, size)]
