"""From a configuration to DeepSpeed's pipeline engine.

Every rank builds the layers of its stage with its tensor-parallel slices, and fills them from weights
that are a function of the seed and their names alone.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep, ReduceGrads
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from harness.model.collectives import all_reduce
from harness.model.dropout import RandomStreams
from harness.model.emulated import set_stage
from harness.model.families import LayerDescription, describe_layers
from harness.model.groups import TensorParallel, build_tensor_parallel
from harness.model.loss import PipelineLoss
from harness.model.weights import initialize, load_full
from harness.record.heartbeat import Phase, no_phase
from harness.run.engines.deepspeed.clipping import global_gradient_norm, scale_gradients
from harness.run.engines.deepspeed.settings import build_deepspeed_config, clips_by_itself
from harness.run.optimizer import build_learning_rate, build_optimizer
from harness.secrets import fill_in
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.parameters import parameter_table
from harness.spec.partition import layers_per_stage
from harness.spec.topology import Topology


class StagedPipeline(PipelineModule):  # type: ignore[misc]  # deepspeed has no types
    """A `PipelineModule` whose stage boundaries are given, and whose parameters know their global names."""

    def __init__(self, layers: list[LayerDescription], boundaries: list[int], **arguments: Any) -> None:
        self._boundaries = boundaries
        self._names = [layer.name for layer in layers]
        super().__init__(layers=[_layer_spec(layer) for layer in layers], **arguments)

    def _partition_layers(self, method: str = "") -> None:
        """Called by `PipelineModule` while it is built."""
        self.parts = self._boundaries
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with names that are the same in every layout."""
        for name, parameter in self.named_parameters():
            head, rest = name.split(".", 1)
            if head == "tied_modules":  # tied_modules.<key>.<path>; the key is the first layer's name
                yield rest, parameter
            else:
                yield f"{self._names[int(head)]}.{rest}", parameter


def _layer_spec(layer: LayerDescription) -> LayerSpec:
    if layer.tied_key is None:
        return LayerSpec(layer.module_class, *layer.args)
    return TiedLayerSpec(layer.tied_key, layer.module_class, *layer.args, forward_fn=layer.forward)


def stage_boundaries(layers: list[LayerDescription], blocks_per_stage: list[int]) -> list[int]:
    """Index of each stage's first layer, and of the end: embeddings go first, norm and head last."""
    first_block = next(i for i, layer in enumerate(layers) if layer.name.startswith("blocks."))
    boundaries = [0]
    for blocks in blocks_per_stage[:-1]:
        boundaries.append((boundaries[-1] or first_block) + blocks)
    return [*boundaries, len(layers)]


@dataclass
class Training:
    """An engine and what the harness knows about it."""

    engine: PipelineEngine
    module: StagedPipeline
    topology: Topology
    tp: TensorParallel
    blocks_per_stage: list[int]
    settings: dict[str, Any]
    """The DeepSpeed configuration, secrets left out."""
    gradient_norm: torch.Tensor | None = None
    """Global norm of the last step before clipping, where the harness clips."""

    def global_gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        norm = self.gradient_norm if self.gradient_norm is not None else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def destroy(self) -> None:
        """Free the engine and its process groups, for each of which gloo keeps threads and connections."""
        engine, grid = self.engine, self.engine.grid
        engine.destroy()
        # The last stage's loss has a hook that holds the engine: a cycle that garbage collection can't see.
        engine.loss = engine.total_loss = None
        engine.pipe_buffers.clear()
        groups = [self.module.world_group, self.tp.group, self.tp.kv_group]
        groups += [grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group]
        groups += [tied["group"] for tied in self.module.tied_comms.values()]
        # In one order on all ranks: NCCL ends a communicator on all of them at once.
        for group in dict.fromkeys(group for group in groups if group is not None):
            dist.destroy_process_group(group)


def build_training(
    config: RunConfig,
    rank: int,
    weights: Callable[[str], torch.Tensor] | None = None,
    phase: Phase = no_phase,
) -> Training:
    """Build this rank's part of the model and its engine; a collective call of all ranks.

    The process group must exist and have `config.parallel.world_size` ranks.

    Args:
        weights: full parameter by global name; None draws fresh ones.
        phase: told what is done next, parameter by parameter.
    """
    phase("building the model")
    parallel = config.parallel
    topology = Topology(pp=parallel.pp, dp=parallel.dp, tp=parallel.tp)
    tp = build_tensor_parallel(
        topology, rank, config.model.num_key_value_heads, sequence_parallel=parallel.sequence_parallel
    )
    streams = RandomStreams(config.train.seed, topology.coordinate(rank).dp)
    layers = describe_layers(config.model, tp, config.train.activation_checkpointing == "full", streams)
    blocks = layers_per_stage(config.model, parallel, config.train.sequence_length)
    settings = build_deepspeed_config(config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition and topology
        with torch.no_grad():  # it broadcasts tied weights
            module = StagedPipeline(
                layers,
                stage_boundaries(layers, blocks),
                topology=PipeModelDataParallelTopology(num_pp=parallel.pp, num_mp=parallel.tp, num_dp=parallel.dp),
                loss_fn=PipelineLoss(config.model.vocab_size, tp),
            )
        if isinstance(config.model, EmulatedModel):
            set_stage(module, config.model, topology.coordinate(rank).pp)
        if weights is None:
            initialize(_filling(module, phase), config.model, tp, config.train.seed)
        else:
            load_full(_filling(module, phase), parameter_table(config.model), weights, tp)
        phase("building the engine")
        optimizer = build_optimizer(config.train, module.parameters())
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=build_learning_rate(config.train, optimizer),
            config=fill_in(settings),
        )
    training = Training(engine, module, topology, tp, blocks, settings)
    if config.model.dropout > 0:
        _number_forward_passes(engine, streams)
    if tp.sequence_parallel:
        before(engine, ReduceGrads, partial(sum_over_slices, training))
    if not clips_by_itself(config):
        _clip_before_optimizer(training, config.train.gradient_clipping)
    return training


def _filling(module: StagedPipeline, phase: Phase) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, each announced: to draw all weights of a large model takes minutes."""
    for name, parameter in module.global_parameters():
        phase(f"filling {name}")
        yield name, parameter


def before(engine: PipelineEngine, instruction: type, act: Callable[[], None]) -> None:
    """Make the engine call `act` before each instruction of a kind."""
    execute = engine._INSTRUCTION_MAP[instruction]

    def act_and_execute(engine: PipelineEngine, **arguments: Any) -> None:
        act()
        execute(engine, **arguments)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: act_and_execute}


def _number_forward_passes(engine: PipelineEngine, streams: RandomStreams) -> None:
    """Tell dropout which forward pass begins; a schedule runs them in the order of the micro-batches."""
    numbers = itertools.count()

    def number() -> None:
        if engine.module.training:  # an evaluation is not counted
            streams.forward_pass = (engine.global_steps, next(numbers) % engine.micro_batches)

    before(engine, ForwardPass, number)


def sum_over_slices(training: Training) -> None:
    """Complete gradients to which each tensor-parallel rank added what its slice of the sequence makes of them.

    They are those of all parameters that are whole on every rank: norms, row-parallel biases, positions (arXiv
    2205.05198). One all-reduce per step, when the micro-batches are added up, makes every copy the same bits.
    """
    engine, group = training.engine, training.tp.group
    assert group is not None
    whole = [parameter for parameter in training.module.parameters() if not parameter.tensor_model_parallel]
    gradients = [parameter._hp_grad if engine.using_bf16_optimizer else parameter.grad for parameter in whole]
    summed = torch.cat([gradient.flatten() for gradient in gradients])
    all_reduce(summed, group)
    totals = torch.split(summed, [gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total.view_as(gradient))


def _clip_before_optimizer(training: Training, max_norm: float) -> None:
    """Make the engine's optimizer instruction take, and clip by, the norm over the whole model."""
    engine = training.engine
    parameters = list(training.module.parameters())
    model_group = engine.grid.get_model_parallel_group() if dist.get_world_size() > 1 else None

    def clip() -> None:
        training.gradient_norm = global_gradient_norm(parameters, training.tp.rank, model_group)
        scale_gradients(parameters, training.gradient_norm, max_norm)

    before(engine, OptimizerStep, clip)
