"""DeepSpeed's pipeline engine with schedules of ours: the one place that knows how it executes them.

Its step stays: ZeRO, the optimizers of bf16 and fp16, the loss over replicas. What comes before is
done here, because `PipelineEngine` has one loss, one gradient and one receive buffer at a time and a single chunk of
layers: here each micro-batch has its own with each chunk. So what observers see of kind, micro-batch and chunk is what
the schedule says, and nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

from harness.model.weight_gradients import PutOff, WeightGradients, add_gradients
from harness.run.engines.deepspeed.reduction import average
from harness.run.engines.deepspeed.transfers import Channels, Transfers
from harness.run.engines.engine import Observers
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule, evaluation

Place = tuple[int, int]
"""Micro-batch and chunk."""
REDUCE_LOSS = Instruction("reduce_loss")
"""The last of a step, which `train_batch` does by itself after the schedule."""


class Program(NamedTuple):
    """What one stage does in a schedule."""

    instructions: list[Instruction]
    transfers: Transfers

    @property
    def num_loaded(self) -> int:
        """Micro-batches that it loads."""
        return len({i.micro_batch for i in self.instructions if i.kind == "load"})


class ScheduledEngine(PipelineEngine):  # type: ignore[misc]  # deepspeed has no types
    """A `PipelineEngine` that executes any schedule, under observation.

    It is built as `deepspeed.initialize` would, which knows no other class.

    Args:
        schedule: of a training step.
        channels: between the stages.
        later: where layers leave the gradients of weights; None: backward passes are whole.
        settings: DeepSpeed's configuration.
    """

    def __init__(
        self,
        schedule: Schedule,
        channels: Channels,
        later: WeightGradients | None,
        module: PipelineModule,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        settings: dict[str, Any],
    ) -> None:
        self._placement: Placement | None = None  # while it is built, a stage is what it is for PipelineEngine
        mpu = module.mpu()
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            mpu=mpu,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
            dist_init_required=False,
        )
        self._configure_python_gc()
        self._placement, self.channels, self._later = schedule.placement, channels, later
        self.observers = Observers()
        self._training = self._program(schedule)
        self._evaluations: dict[int, Program] = {}
        self.total_loss: Tensor | None
        self._chunk: int | None = None
        """Which computes now."""
        self._batches: list[Any] = []
        """Micro-batches that were drawn from the data."""
        self._labels: dict[int, tuple[Tensor, ...]] = {}
        self._inputs: dict[Place, Tensor] = {}
        """Of forward passes; then leaves of autograd, whose gradient is to be sent."""
        self._outputs: dict[Place, Tensor] = {}
        """Where backward passes begin: of the last part, losses."""
        self._gradients: dict[Place, Tensor] = {}
        """Of outputs that are no losses."""
        self._gradients_to_send: dict[Place, Tensor] = {}
        """Of inputs."""
        self._left: dict[Place, list[PutOff]] = {}
        """What split backward passes have put off."""
        self._functions: dict[str, Callable[[Instruction], Any]] = {
            "load": self._load,
            "forward": self._forward,
            "backward": self._backward,
            "backward_input": self._backward_input,
            "backward_weight": self._backward_weight,
            "send_activation": self._send_activation,
            "recv_activation": self._receive_activation,
            "send_gradient": self._send_gradient,
            "recv_gradient": self._receive_gradient,
            "reduce_tied_gradients": lambda _: self._exec_reduce_tied_grads(),
            "reduce_gradients": lambda _: self._reduce_gradients(),
            "optimizer": lambda _: self._exec_optimizer_step(),
        }

    def _program(self, schedule: Schedule) -> Program:
        instructions = [i for i in schedule.stages[self.stage_id] if i != REDUCE_LOSS]
        return Program(instructions, Transfers(self.channels, schedule))

    # --- what PipelineEngine asks

    def is_first_stage(self) -> bool:
        """Whether what computes takes the samples; between passes, whether a chunk of this stage does."""
        return bool(super().is_first_stage()) if self._placement is None else self._has(self._placement.begins)

    def is_last_stage(self) -> bool:
        """Whether what computes ends with the loss; between passes, whether a chunk of this stage does."""
        return bool(super().is_last_stage()) if self._placement is None else self._has(self._placement.ends)

    def _has(self, end: Callable[[int, int], bool]) -> bool:
        assert self._placement is not None
        chunks = range(self._placement.num_chunks) if self._chunk is None else [self._chunk]
        return any(end(self.stage_id, chunk) for chunk in chunks)

    def _loss_stage_global_rank(self) -> int:
        assert self._placement is not None
        return int(self.grid.stage_to_global(self._placement.stage_of(self._placement.num_parts - 1)))

    def _train_schedule(self) -> Program:
        return self._training

    def _inference_schedule(self, micro_batches: int) -> Program:
        if micro_batches not in self._evaluations:
            assert self._placement is not None
            self._evaluations[micro_batches] = self._program(evaluation(self._placement, micro_batches))
        return self._evaluations[micro_batches]

    def _aggregate_total_loss(self) -> Tensor:
        total: Tensor = self.observers.execute(REDUCE_LOSS, super()._aggregate_total_loss)
        return total

    def _exec_schedule(self, program: Program) -> None:
        self.fwd_outputs: list[Tensor] = []
        self._batches.clear()
        program.transfers.begin()
        self._transfers, self._num_loaded = program.transfers, program.num_loaded
        for instruction in program.instructions:
            self.observers.execute(instruction, partial(self._functions[instruction.kind], instruction))
        program.transfers.end()

    # --- instructions

    def _load(self, instruction: Instruction) -> None:
        """What a chunk needs of a micro-batch; all are drawn with the first, while the caches hold what draws them."""
        _, number, chunk, _ = instruction
        if not self._batches:
            self._batches = [self._next_batch() for _ in range(self._num_loaded)]
        tokens, labels = self._batches[number]
        with self._computing(chunk):
            if self.is_first_stage():
                self._inputs[number, chunk] = tokens.to(self.device)
            if self.is_last_stage():
                self._labels[number] = tuple(label.to(self.device) for label in labels)

    def _receive_activation(self, instruction: Instruction) -> None:
        received = self._transfers.receive(instruction)
        self._inputs[instruction.micro_batch, instruction.chunk] = received.requires_grad_(torch.is_grad_enabled())

    def _forward(self, instruction: Instruction) -> None:
        _, number, chunk, _ = instruction
        trains = torch.is_grad_enabled()
        inputs = self._inputs[number, chunk] if trains else self._inputs.pop((number, chunk))
        with self._computing(chunk):
            output: Tensor = DeepSpeedEngine.forward(self, inputs, chunk=chunk)
            if self.is_last_stage():
                output = self.module.loss_fn(output, self._labels.pop(number))
                self.fwd_outputs.append(output.detach())
                total = self.total_loss
                self.total_loss = output.detach().clone() if total is None else total + output.detach()
        following = self._chunk_here(chunk, 1)
        if following is not None:
            self._inputs[number, following] = output.detach().requires_grad_(trains)
        if trains or not self._ends(chunk):
            self._outputs[number, chunk] = output

    def _send_activation(self, instruction: Instruction) -> None:
        place = instruction.micro_batch, instruction.chunk
        output = self._outputs[place] if torch.is_grad_enabled() else self._outputs.pop(place)
        self._transfers.send(instruction, output.detach())

    def _receive_gradient(self, instruction: Instruction) -> None:
        self._gradients[instruction.micro_batch, instruction.chunk] = self._transfers.receive(instruction)

    def _backward(self, instruction: Instruction) -> None:
        self._backward_input(instruction)
        if self._later is not None:
            self._backward_weight(instruction)

    def _backward_input(self, instruction: Instruction) -> None:
        """A whole backward pass, but for what the layers leave for later."""
        _, number, chunk, _ = instruction
        place = number, chunk
        output, inputs = self._outputs.pop(place), self._inputs.pop(place)
        with self._computing(chunk):
            if self.is_last_stage():
                self._clear_gradients_of_the_pass()
                DeepSpeedEngine.backward(self, output)
            else:
                with self._backward_pass():
                    torch.autograd.backward(output, self._gradients.pop(place))
        gradient, previous = inputs.grad, self._chunk_here(chunk, -1)
        if gradient is not None:  # there is none of tokens
            if previous is None:
                self._gradients_to_send[place] = gradient
            else:
                self._gradients[number, previous] = gradient
        if self._later is not None:
            self._left[place] = self._later.take()

    def _backward_weight(self, instruction: Instruction) -> None:
        with self._backward_pass():
            add_gradients(self._left.pop((instruction.micro_batch, instruction.chunk)))

    def _send_gradient(self, instruction: Instruction) -> None:
        place = instruction.micro_batch, instruction.chunk
        self._transfers.send(instruction, self._gradients_to_send.pop(place))

    def _reduce_gradients(self) -> None:
        """Average over replicas: DeepSpeed's way, but for plain fp32, which needs no copy of the gradients."""
        is_plain = not self.zero_optimization() and not self.using_bf16_optimizer and self._scales_once()
        if not is_plain:
            self._exec_reduce_grads()
        elif self.dp_world_size > 1:
            gradients, _ = self._get_gradients_for_reduction()
            average(gradients, self.mpu.get_data_parallel_group())

    def _scales_once(self) -> bool:
        """Whether gradients are summed in their own type, and then divided, which settings of DeepSpeed may change."""
        in_fp32 = self.communication_data_type == torch.float32
        return bool(in_fp32 and self.postscale_gradients() and self.gradient_predivide_factor() == 1.0)

    # --- what they have in common

    @contextmanager
    def _computing(self, chunk: int) -> Iterator[None]:
        """Inside, this stage is the first or last if the chunk begins or ends the model."""
        self._chunk = chunk
        try:
            yield
        finally:
            self._chunk = None

    @contextmanager
    def _backward_pass(self) -> Iterator[None]:
        """What DeepSpeed does around a backward pass that begins in the middle of the model."""
        self._clear_gradients_of_the_pass()
        self._running_engine_backward = True  # its hooks leave scaling and the end of the pass to us
        try:
            yield
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads()

    def _clear_gradients_of_the_pass(self) -> None:
        """With bf16, gradients of one pass are added to those in fp32 at its end."""
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads(set_to_none=True)

    def _chunk_here(self, chunk: int, distance: int) -> int | None:
        """The chunk of the part `distance` further, if this stage holds it."""
        assert self._placement is not None
        part = self._placement.part(self.stage_id, chunk) + distance
        if not 0 <= part < self._placement.num_parts:
            return None
        stage, found = self._placement.place(part)
        return found if stage == self.stage_id else None

    def _ends(self, chunk: int) -> bool:
        assert self._placement is not None
        return self._placement.ends(self.stage_id, chunk)
