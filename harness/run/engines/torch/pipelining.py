"""Pipelines as torch has them: `torch.distributed.pipelining`, its stages and its schedules, to compare with.

The layers, where they are and the optimizer are those of the other engines, also what is left of a backward pass that
a schedule splits (`dw_builder`). The order of passes and all transfers between stages are torch's: nobody sees a
transfer begin or end, and stages wait for them between two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from harness.model.assembly import build_steps, describe_layers, part_boundaries
from harness.model.emulated import set_stage
from harness.model.groups import TensorParallel
from harness.model.weight_gradients import WeightGradients, add_gradients
from harness.record.heartbeat import Phase
from harness.run.data import MicroBatch
from harness.run.engines.engine import ForwardPasses, Held, Observers
from harness.run.engines.torch.engine import TorchEngine, build_as, cross_entropy, gradients_of, norm_over_ranks
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.partition import layers_per_part
from harness.spec.schedules import END_OF_STEP, Instruction, placement_of

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb_v": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""torch's by the names of ours."""
SPLIT = ("zb_v", "dualpipev")
"""Those that compute gradients of inputs and of weights one after the other."""


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> TorchEngine:
    """As `harness.run.engines.engine.build_engine`; one rank needs no pipeline."""
    return build_as(TorchEngine if config.parallel.pp == 1 else PipelinedEngine, config, rank, weights, phase)


class Part(nn.Module):
    """Layers that follow each other; the last of a model end with the loss.

    Args:
        steps: what they compute, each of the output of the one before.
        loss: (logits, targets) -> scalar, where these are the last.
    """

    def __init__(
        self,
        steps: Sequence[Callable[[Tensor], Tensor]],
        modules: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)
        self._steps, self._loss = steps, loss

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """What comes out of the last layer, [batch, sequence, hidden], or the loss."""
        for step in self._steps:
            hidden = step(hidden)
        if self._loss is None:
            return hidden
        assert targets is not None
        return self._loss(hidden, targets)


class ObservedStage(PipelineStage):
    """A part of a model as torch's schedules know it, whose passes are observed."""

    def __init__(self, observers: Observers, chunk: int, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._observers, self._chunk = observers, chunk

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        """The forward pass of a micro-batch."""
        act = partial(super().forward_one_chunk, fwd_chunk_id, *arguments, **named)
        return self._observers.execute(Instruction("forward", fwd_chunk_id, self._chunk), act)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Its backward pass, or the first half."""
        kind = "backward" if full_backward else "backward_input"
        act = partial(super().backward_one_chunk, bwd_chunk_id, loss, full_backward, last_backward)
        self._observers.execute(Instruction(kind, bwd_chunk_id, self._chunk), act)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The second half of its backward pass."""
        act = partial(super().backward_weight_one_chunk, bwd_chunk_id, last_backward)
        self._observers.execute(Instruction("backward_weight", bwd_chunk_id, self._chunk), act)


def _weight_pass(later: WeightGradients) -> Callable[[], None]:
    """The second half of the backward pass that has just ended."""
    return partial(add_gradients, later.take())


class PipelinedEngine(TorchEngine):
    """An `Engine` of one stage of a pipeline, of the chunks that the configured schedule gives it."""

    is_parallel = True

    def __init__(self, config: RunConfig, *arguments: Any, **named: Any) -> None:
        self._placement = placement_of(config.parallel)
        super().__init__(config, *arguments, **named)
        self.topology = config.parallel.topology
        parts, last = self._placement.parts_of(self.rank), self._placement.num_parts - 1
        self._first_chunk = parts.index(0) if 0 in parts else None
        self._last_chunk = parts.index(last) if last in parts else None
        self._loss_rank = self._placement.stage_of(last)
        ends = [self._placement.stage_of(0), self._loss_rank]
        is_tied = config.model.tie_word_embeddings and ends[0] != ends[1]
        group = dist.new_group(ends, backend=self.backend) if is_tied else None  # of all ranks a call, of two the group
        self._tied_group = group if self.rank in ends else None
        self._has_copy = is_tied and self.rank == self._loss_rank
        self.observers.append(ForwardPasses(self.context, lambda: self.steps_taken))
        self._schedule = self._build_schedule()

    def _build_model(self) -> nn.Module:
        config, placement = self.config, self._placement
        if config.parallel.schedule in SPLIT:
            self.tp = TensorParallel.single(WeightGradients())
        self.blocks_per_part = layers_per_part(config.model, config.parallel, config.train.sequence_length)
        checkpointing = config.train.activation_checkpointing == "full"
        layers = describe_layers(config.model, self.tp, checkpointing, self.context)
        boundaries = part_boundaries(layers, self.blocks_per_part)
        self._built: dict[str, nn.Module] = {}
        self._parts: list[Part] = []
        for part in placement.parts_of(self.rank):
            own = layers[boundaries[part] : boundaries[part + 1]]
            steps = build_steps(own, self._built)
            modules = [self._built[layer.tied_key or layer.name] for layer in own]
            self._parts.append(Part(steps, modules, self._loss if part + 1 == placement.num_parts else None))
        model = nn.ModuleList(self._parts)
        if isinstance(config.model, EmulatedModel):
            set_stage(model, config.model, self.rank)
        return model.to(self.device, self.dtype)

    @property
    def _hidden_shape(self) -> tuple[int, int, int]:
        train = self.config.train
        return train.micro_batch_size, train.sequence_length, self.config.model.hidden_size

    def _build_schedule(self) -> Any:
        # What passes between stages is known, so torch need not try it out.
        hidden = torch.empty(self._hidden_shape, dtype=self.dtype, device="meta", requires_grad=True)
        tokens, loss = hidden.detach()[..., 0].long(), hidden[0, 0, 0]
        last = self._placement.num_parts - 1
        stages = [
            ObservedStage(
                self.observers,
                chunk,
                self._parts[chunk],
                part,
                self._placement.num_parts,
                self.device,
                group=self.group,
                input_args=tokens if part == 0 else hidden,
                output_args=loss if part == last else hidden,
                dw_builder=None if self.tp.later is None else partial(_weight_pass, self.tp.later),
            )
            for chunk, part in enumerate(self._placement.parts_of(self.rank))
        ]
        return SCHEDULES[self.config.parallel.schedule](
            stages if len(stages) > 1 else stages[0],
            self.config.num_micro_batches,
            loss_fn=lambda loss, _: loss,  # the last part has computed it, so that its passes include it
            scale_grads=False,
        )

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits[..., : self.config.model.vocab_size], targets).sum() / self._valid

    # --- a step

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch; its loss."""
        self.model.train()
        tokens, targets = self._whole_batch(data, self.config.num_micro_batches)
        losses: list[Tensor] = []
        self._schedule.step(
            *([] if tokens is None else [tokens]),
            **({} if targets is None else {"targets": targets}),
            target=targets,
            losses=losses,
            return_outputs=False,
        )
        for loss in losses:
            self._total += loss.detach()
        self._execute(END_OF_STEP, data)
        self.steps_taken += 1
        return float(self._total)

    def _whole_batch(self, data: Iterator[MicroBatch], num_micro_batches: int) -> tuple[Tensor | None, Tensor | None]:
        """Tokens and targets, those of them that this stage needs: [micro-batches x batch, sequence]."""
        self._begin()
        if self._first_chunk is None and self._last_chunk is None:
            return None, None
        chunk = self._last_chunk if self._first_chunk is None else self._first_chunk
        assert chunk is not None
        self._execute([Instruction("load", number, chunk) for number in range(num_micro_batches)], data)
        tokens = None if self._first_chunk is None else torch.cat([tokens for tokens, _ in self._batch])
        targets = None if self._last_chunk is None else torch.cat([targets for _, (targets, _) in self._batch])
        return tokens, targets

    @torch.no_grad()
    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, without learning from them.

        torch's schedules evaluate no V, and no other number of micro-batches than they train with. So each chunk takes
        all micro-batches here before it sends one: slow, but never do two stages wait to send to each other.
        """
        self.model.eval()
        tokens, targets = self._whole_batch(data, num_micro_batches)
        size = self.config.train.micro_batch_size
        hidden: list[Tensor] = []
        for chunk, part in enumerate(self._placement.parts_of(self.rank)):
            if part == 0:
                assert tokens is not None
                hidden = list(torch.split(tokens, size))
            elif (before := self._placement.stage_of(part - 1)) != self.rank:
                hidden = [self._received(before) for _ in range(num_micro_batches)]
            for number, given in enumerate(hidden):
                kwargs = {} if targets is None else {"targets": targets[number * size :][:size]}
                act = partial(self._parts[chunk], given, **kwargs)
                hidden[number] = self.observers.execute(Instruction("forward", number, chunk), act)
            if chunk == self._last_chunk:
                self._total += torch.stack(hidden).sum()
            elif (after := self._placement.stage_of(part + 1)) != self.rank:
                for output in hidden:
                    dist.send(output, after, group=self.group)
        self._execute([Instruction("reduce_loss")], data)
        return float(self._total)

    def _received(self, stage: int) -> Tensor:
        hidden = torch.empty(self._hidden_shape, dtype=self.dtype, device=self.device)
        dist.recv(hidden, stage, group=self.group)
        return hidden

    def _reduce_tied_gradients(self) -> None:
        """torch's pipelining knows of no weights that two stages share: as its users must, add up both gradients."""
        if self._tied_group is not None:
            (weight,) = self._built["embedding"].parameters()
            dist.all_reduce(weight.grad, group=self._tied_group)

    def _reduce_loss(self) -> None:
        dist.broadcast(self._total, self._loss_rank, group=self.group)
        self._total = self._total.cpu()

    def _gradient_norm(self) -> Tensor:
        return norm_over_ranks(gradients_of(self._own_parameters()), self.device, self.group)

    # --- what this rank holds

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's by name."""
        for layer, module in self._built.items():
            for name, parameter in module.named_parameters():
                yield f"{layer}.{name}", parameter

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Without the copy of a tied weight whose original is on another stage."""
        return ((name, p) for name, p in self.parameters() if not (self._has_copy and name == "embedding.weight"))

    def held(self, tied_copies: bool) -> Iterator[tuple[str, Held]]:
        """All of this stage's."""
        for name, parameter in self.parameters() if tied_copies else self._own_parameters():
            yield name, Held(parameter, 0, 0, parameter.numel())

    def destroy(self) -> None:
        """Leave the groups, also that of tied weights."""
        super().destroy()
        if self._tied_group is not None:
            dist.destroy_process_group(self._tied_group)
