"""Rank program: what the parity check says when a part of the harness is replaced by a wrong one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from helpers import make_config
from ranks_parity import TINY
from torch import Tensor

import harness.model.layers as layers
import harness.model.weights as weights
import harness.run.engines.deepspeed.engine as build
import harness.run.engines.deepspeed.scheduled as scheduled
import harness.run.engines.deepspeed.transfers as transfers
import harness.run.optimizer as optimizer_module
import harness.run.parity as parity
from harness.model.weight_gradients import PutOff
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.spec.config import RunConfig, Train
from harness.spec.parameters import ParameterSpec
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule

Patch = Callable[[pytest.MonkeyPatch], None]
DEFECTS: dict[str, Patch] = {}


def defect(patch: Patch) -> Patch:
    DEFECTS[patch.__name__] = patch
    return patch


@defect
def none(patch: pytest.MonkeyPatch) -> None:
    pass


@defect
def f_does_not_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        layers, "copied_linear", lambda hidden, weight, bias, group, later: layers.linear(hidden, weight, bias, later)
    )


@defect
def g_does_not_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "reduce_from_tensor_parallel", lambda tensor, group: tensor)


@defect
def qkv_sliced_contiguously(patch: pytest.MonkeyPatch) -> None:
    right = weights.shard

    def contiguous(full: Tensor, spec: ParameterSpec, tp_rank: int, tp_size: int) -> Tensor:
        fused = len(spec.parts) > 1
        return full.chunk(tp_size)[tp_rank] if fused else right(full, spec, tp_rank, tp_size)

    patch.setattr(weights, "shard", contiguous)


@defect
def row_bias_added_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.RowParallelLinear, hidden: Tensor) -> Tensor:
        output = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return layers.reduce_from_tensor_parallel(output, self.tp.group)

    patch.setattr(layers.RowParallelLinear, "forward", forward)


@defect
def norm_gradients_not_summed_under_sequence_parallelism(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build.DeepSpeedEngine, "_sum_over_ranks", lambda self: None)


@defect
def sum_of_slices_skips_the_other_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "scatter_sum", lambda part, group: part.chunk(group.size, dim=1)[group.process_group.rank()])


@defect
def tied_copies_not_reduced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PipelineEngine, "_exec_reduce_tied_grads", lambda engine: None)


@defect
def gradient_scaled_by_m(patch: pytest.MonkeyPatch) -> None:
    right = scheduled.ScheduledEngine._reduce_gradients

    def scaled(engine: scheduled.ScheduledEngine) -> None:
        right(engine)
        for parameter in engine.module.parameters():
            parameter.grad *= engine.micro_batches

    patch.setattr(scheduled.ScheduledEngine, "_reduce_gradients", scaled)


@defect
def one_gradient_off_by_a_thousandth(patch: pytest.MonkeyPatch) -> None:
    right = scheduled.ScheduledEngine._reduce_gradients

    def scaled(engine: scheduled.ScheduledEngine) -> None:
        right(engine)
        largest = max(engine.module.parameters(), key=lambda parameter: float(parameter.grad.norm()))
        largest.grad *= 1.001

    patch.setattr(scheduled.ScheduledEngine, "_reduce_gradients", scaled)


@defect
def last_micro_batch_left_out(patch: pytest.MonkeyPatch) -> None:
    """Its samples are loaded and not computed, by a schedule that all stages agree on."""
    right = build.schedule_of

    def without(config: RunConfig) -> Schedule:
        schedule = right(config)
        last = schedule.num_micro_batches - 1
        stages = [[i for i in s if i.kind == "load" or i.micro_batch != last] for s in schedule.stages]
        return replace(schedule, stages=stages)

    patch.setattr(build, "schedule_of", without)


@defect
def a_weight_pass_dropped(patch: pytest.MonkeyPatch) -> None:
    right = scheduled.ScheduledEngine._backward_weight

    def without(engine: scheduled.ScheduledEngine, instruction: Instruction) -> None:
        if instruction.micro_batch != 1:
            right(engine, instruction)

    patch.setattr(scheduled.ScheduledEngine, "_backward_weight", without)


@defect
def a_weight_pass_doubled(patch: pytest.MonkeyPatch) -> None:
    right = scheduled.add_gradients
    passes = count()

    def twice(left: list[PutOff]) -> None:
        if next(passes) == 1:
            right(list(left))
        right(left)

    patch.setattr(scheduled, "add_gradients", twice)


@defect
def a_chunk_on_the_wrong_stage(patch: pytest.MonkeyPatch) -> None:
    """Two stages change their middle chunks."""
    right, other = Placement.parts_of, {2: 3, 3: 2}
    patch.setattr(Placement, "parts_of", lambda self, stage: [other.get(part, part) for part in right(self, stage)])


@defect
def a_gradient_received_into_a_live_buffer(patch: pytest.MonkeyPatch) -> None:
    """One buffer for all that a stage receives, as DeepSpeed has it."""

    def receive(channels: transfers.Channels, lane: transfers.Lane, stage: int) -> tuple[Any, Tensor]:
        if not hasattr(channels, "buffer"):
            channels.buffer = torch.empty(channels._shape, dtype=channels._dtype)
        peer, tag = channels._pipeline[stage], channels._tags[lane]
        return torch.distributed.irecv(channels.buffer, peer, channels._group(lane), tag), channels.buffer

    patch.setattr(transfers.Channels, "receive", receive)


@defect
def clipping_key_left_out(patch: pytest.MonkeyPatch) -> None:
    right = build.build_deepspeed_config

    def without_key(config: Any) -> dict[str, Any]:
        return {key: value for key, value in right(config).items() if key != "gradient_clipping"}

    patch.setattr(build, "build_deepspeed_config", without_key)


@defect
def clipping_by_one_stage(patch: pytest.MonkeyPatch) -> None:
    right = build.global_gradient_norm
    patch.setattr(build, "global_gradient_norm", lambda parameters, tp_rank, group: right(parameters, tp_rank, None))


@defect
def step_taken_twice(patch: pytest.MonkeyPatch) -> None:
    right = PipelineEngine._exec_optimizer_step

    def twice(engine: PipelineEngine) -> None:
        engine.optimizer.step()
        right(engine)

    patch.setattr(PipelineEngine, "_exec_optimizer_step", twice)


@defect
def labels_of_the_micro_batch_before(patch: pytest.MonkeyPatch) -> None:
    right = parity.micro_batches

    def shifted(*arguments: Any) -> Iterator[Any]:
        before = None
        for tokens, labels in right(*arguments):
            yield tokens, before or labels
            before = labels

    patch.setattr(parity, "micro_batches", shifted)


@defect
def norms_and_biases_decay(patch: pytest.MonkeyPatch) -> None:
    def decay_all(train: Train, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = optimizer_module.build_optimizer(train, parameters)
        for group in optimizer.param_groups:
            group["weight_decay"] = train.weight_decay if train.optimizer == "adamw" else 0.0
        return optimizer

    patch.setattr(build, "build_optimizer", decay_all)


@defect
def learning_rate_a_step_late(patch: pytest.MonkeyPatch) -> None:
    right = optimizer_module.learning_rate_factor
    patch.setattr(optimizer_module, "learning_rate_factor", lambda train, step: right(train, max(0, step - 1)))


@defect
def betas_swapped(patch: pytest.MonkeyPatch) -> None:
    def swapped(train: Train, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return optimizer_module.build_optimizer(
            train.model_copy(update={"adam_betas": train.adam_betas[::-1]}), parameters
        )

    patch.setattr(build, "build_optimizer", swapped)


@defect
def copies_differ(patch: pytest.MonkeyPatch) -> None:
    """A gradient that tensor-parallel ranks hold alike is off on one of them, which is not the first."""
    right = parity.Layout._read_gradients

    def read(layout: parity.Layout) -> None:
        right(layout)
        if layout.rank == 1:
            name = next(name for name in layout.gradients if "norm" in name)
            layout.gradients[name] = layout.gradients[name] * (1 + 1e-6)  # far below the tolerance

    patch.setattr(parity.Layout, "_read_gradients", read)


def run(argument: list[tuple[str, list[str], str]], folder: Path) -> dict[str, list[str]]:
    """Comparisons that failed: defect -> their kinds; of those of one variant, if one is named."""
    torch.set_num_threads(1)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    answers = {}
    for name, overrides, label in argument:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "VARIANTS", [v for v in parity.VARIANTS if label in ("", v.label)])
            DEFECTS[name](patch)
            comparisons = parity.check_parity(make_config(*TINY, *overrides), rank)
        answers[name] = [comparison.kind for comparison in comparisons if not comparison.passed]
    return answers
