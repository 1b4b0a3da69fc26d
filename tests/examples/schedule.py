"""A schedule whose stages never work at the same time."""

from collections.abc import Iterator
from fractions import Fraction

from harness.spec.schedules import Instruction, ScheduleKind, Stage, backward, forward


def one_by_one(stage: Stage) -> Iterator[Instruction]:
    """A forward pass through all stages, then the backward pass, and then the next micro-batch."""
    for micro_batch in range(stage.num_micro_batches):
        yield forward(micro_batch)
        yield backward(micro_batch)


SCHEDULE = ScheduleKind(one_by_one, ideal_overhead=lambda p, m, v: Fraction(p - 1))
