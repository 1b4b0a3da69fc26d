"""Our instructions in DeepSpeed's hands: the one place that knows how its pipeline engine executes them.

`PipelineEngine` asks `_train_schedule` or `_inference_schedule` for a schedule, and looks each of its commands up in
`_INSTRUCTION_MAP`. Here both give commands of one kind, `Execute`, which carry an instruction of ours; it is executed
by DeepSpeed's own function for it, and the observers are told. So what they see of kind, micro-batch and chunk is what
the schedule says, and nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as stock
from deepspeed.runtime.pipe.engine import PipelineEngine

from harness.run.engines.engine import Observers
from harness.spec.schedules import Instruction, Schedule

CLASS_OF_KIND: dict[str, type[stock.PipeInstruction]] = {
    "load": stock.LoadMicroBatch,
    "forward": stock.ForwardPass,
    "backward": stock.BackwardPass,
    "send_activation": stock.SendActivation,
    "recv_activation": stock.RecvActivation,
    "send_gradient": stock.SendGrad,
    "recv_gradient": stock.RecvGrad,
    "reduce_tied_gradients": stock.ReduceTiedGrads,
    "reduce_gradients": stock.ReduceGrads,
    "optimizer": stock.OptimizerStep,
}
REDUCE_LOSS = Instruction("reduce_loss")
"""The last of a step, which `train_batch` does by itself after the schedule."""


class Execute(stock.PipeInstruction):  # type: ignore[misc]  # deepspeed has no types
    """One of our instructions, with the buffer that DeepSpeed's function for it works on."""


class Commands:
    """What one stage does, as DeepSpeed takes it: an iterator over lists of commands.

    A micro-batch has one of the engine's buffers from its first instruction to its last, in 1F1B the same one as in
    DeepSpeed's own schedule.
    """

    def __init__(self, instructions: list[Instruction]) -> None:
        executed = [instruction for instruction in instructions if instruction != REDUCE_LOSS]
        numbers = [instruction.micro_batch for instruction in executed if instruction.micro_batch >= 0]
        self._num_buffers = max(2, _most_open(numbers))
        buffers = _buffers(numbers, self._num_buffers)
        self._commands = [
            Execute(instruction=i, arguments={} if i.micro_batch < 0 else {"buffer_id": buffers[i.micro_batch]})
            for i in executed
        ]

    def num_pipe_buffers(self) -> int:
        """How many buffers DeepSpeed is to have."""
        return self._num_buffers

    def __iter__(self) -> Iterator[list[Execute]]:
        yield self._commands


def _most_open(numbers: list[int]) -> int:
    """Micro-batches that have begun and not ended, at most.

    Args:
        numbers: of the micro-batches that instructions work on, in their order.
    """
    last = {number: position for position, number in enumerate(numbers)}
    most, begun = 0, set[int]()
    for position, number in enumerate(numbers):
        begun.add(number)
        most = max(most, len(begun))
        begun -= {number} if position == last[number] else set()
    return most


def _buffers(numbers: list[int], num_buffers: int) -> dict[int, int]:
    """Micro-batch -> buffer, which no two that are open at once share; its number modulo theirs where that is free."""
    last = {number: position for position, number in enumerate(numbers)}
    found, taken = dict[int, int](), set[int]()
    for position, number in enumerate(numbers):
        if number not in found:
            free = [buffer for buffer in range(num_buffers) if buffer not in taken]
            found[number] = number % num_buffers if number % num_buffers in free else free[0]
            taken.add(found[number])
        if position == last[number]:
            taken.remove(found[number])
    return found


def take_over(
    engine: PipelineEngine,
    training: Schedule,
    evaluation: Callable[[int], list[Instruction]],
    observers: Observers,
) -> None:
    """Make an engine execute schedules of ours, under observation.

    Args:
        training: of a step.
        evaluation: what this stage does in an evaluation of so many micro-batches.
    """
    functions = {kind: engine._INSTRUCTION_MAP[command] for kind, command in CLASS_OF_KIND.items()}
    losses = dict[int, Any]()
    """Of micro-batches that await their backward pass: the engine has room for one, that of the last forward pass."""

    def act(engine: PipelineEngine, instruction: Instruction, arguments: dict[str, Any]) -> None:
        if instruction.kind == "backward":
            engine.loss = losses.pop(instruction.micro_batch)
        functions[instruction.kind](engine, **arguments)
        if instruction.kind == "forward" and torch.is_grad_enabled():
            losses[instruction.micro_batch] = engine.loss

    def execute(engine: PipelineEngine, instruction: Instruction, arguments: dict[str, Any]) -> None:
        observers.execute(instruction, lambda: act(engine, instruction, arguments))

    aggregate: Callable[[], torch.Tensor] = engine._aggregate_total_loss
    stage = engine.stage_id
    commands = Commands(training.stages[stage])
    engine._INSTRUCTION_MAP = {Execute: execute}
    engine._train_schedule = lambda: commands
    engine._inference_schedule = lambda micro_batches: Commands(evaluation(micro_batches))
    engine._aggregate_total_loss = lambda: observers.execute(REDUCE_LOSS, aggregate)
