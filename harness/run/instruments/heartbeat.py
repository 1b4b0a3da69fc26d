"""What a rank tells of where it stands in training: a mark as each instruction begins and ends."""

from __future__ import annotations

from collections.abc import Callable

from harness.record.heartbeat import STANDS, Heart
from harness.run.engines.engine import Observer
from harness.spec.schedules import Instruction


class HeartbeatObserver(Observer):
    """Lets every instruction of an engine leave a mark in the rank's heartbeat when it begins and ends.

    Args:
        steps_taken: optimizer steps that the engine has taken.
        device_kind: on a GPU an instruction's end says that it is enqueued, not that it is done.
        num_chunks: of a stage; a single one is not worth a word.
    """

    def __init__(self, heart: Heart, steps_taken: Callable[[], int], device_kind: str, num_chunks: int = 1) -> None:
        self._mark, self._steps_taken, self._names_chunks = heart.mark, steps_taken, num_chunks > 1
        words = ("enqueuing", "after enqueuing") if device_kind == "cuda" else ("in", "after")
        self._begun, self._ended = map(STANDS.index, words)
        self._step = 0

    def began(self, instruction: Instruction) -> None:
        """Mark the begin."""
        if instruction.micro_batch >= 0:  # what ends a step may come after the step was counted
            self._step = self._steps_taken() + 1
        self._note(instruction, self._begun)

    def ended(self, instruction: Instruction) -> None:
        """Mark the end; of the optimizer's step, too, which it belongs to."""
        self._note(instruction, self._ended)

    def _note(self, instruction: Instruction, stands: int) -> None:
        chunk = instruction.chunk if self._names_chunks else -1
        self._mark(self._step, instruction.micro_batch, stands, instruction.kind.encode(), chunk)
