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

    Args:
        instructions: of the stage.
        num_buffers: of activations; a micro-batch has the one of its number modulo this.
    """

    def __init__(self, instructions: list[Instruction], num_buffers: int) -> None:
        self._num_buffers = num_buffers
        self._commands = [
            Execute(instruction=instruction, arguments=self._arguments(instruction))
            for instruction in instructions
            if instruction != REDUCE_LOSS
        ]

    def _arguments(self, instruction: Instruction) -> dict[str, int]:
        of_step = instruction.micro_batch < 0
        return {} if of_step else {"buffer_id": instruction.micro_batch % self._num_buffers}

    def num_pipe_buffers(self) -> int:
        """How many buffers DeepSpeed is to have."""
        return self._num_buffers

    def __iter__(self) -> Iterator[list[Execute]]:
        yield self._commands


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

    def execute(engine: PipelineEngine, instruction: Instruction, arguments: dict[str, Any]) -> None:
        observers.execute(instruction, lambda: functions[instruction.kind](engine, **arguments))

    aggregate: Callable[[], torch.Tensor] = engine._aggregate_total_loss
    stage = engine.stage_id
    commands = Commands(training.stages[stage], max(2, training.micro_batches_in_flight[stage]))
    engine._INSTRUCTION_MAP = {Execute: execute}
    engine._train_schedule = lambda: commands
    engine._inference_schedule = lambda micro_batches: Commands(evaluation(micro_batches), 2)
    engine._aggregate_total_loss = lambda: observers.execute(REDUCE_LOSS, aggregate)
