"""DeepSpeed's pipeline engine behind the harness's protocol.

Every rank builds the layers of its stage with its tensor-parallel slices, and fills them from weights
that are a function of the seed and their names alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from harness.model.assembly import describe_layers, part_boundaries
from harness.model.collectives import all_reduce
from harness.model.context import PassContext
from harness.model.emulated import set_stage
from harness.model.groups import TensorParallel, build_tensor_parallel
from harness.model.loss import PipelineLoss
from harness.model.precision import dtype_of
from harness.model.weight_gradients import WeightGradients
from harness.record.heartbeat import Phase
from harness.run.compilation import Compilation, compile_blocks
from harness.run.data import MicroBatch
from harness.run.engines.deepspeed.clipping import global_gradient_norm, scale_gradients
from harness.run.engines.deepspeed.pipeline import PartedPipeline
from harness.run.engines.deepspeed.scheduled import ScheduledEngine
from harness.run.engines.deepspeed.settings import build_deepspeed_config, clips_by_itself
from harness.run.engines.deepspeed.transfers import Channels
from harness.run.engines.engine import Before, ForwardPasses, Held, Progress, filling
from harness.run.optimizer import build_learning_rate, build_optimizer
from harness.run.shared_memory import describe_transports, share_memory
from harness.run.weights import fill_masters, fill_parameters
from harness.secrets import fill_in
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.parameters import parameter_table
from harness.spec.partition import layers_per_part
from harness.spec.schedules import schedule_of
from harness.spec.topology import Topology

LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's loss scalers, of which a static one has only the first."""


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> DeepSpeedEngine:
    """As `harness.run.engines.engine.build_engine`."""
    phase("building the model")
    parallel = config.parallel
    topology = parallel.topology
    share_memory(parallel.shared_memory)
    schedule = schedule_of(config)
    later = WeightGradients() if schedule.splits_backward else None
    tp = build_tensor_parallel(
        topology, rank, config.model.num_key_value_heads, sequence_parallel=parallel.sequence_parallel, later=later
    )
    context = PassContext(config.train.seed, topology.coordinate(rank).dp)
    layers = describe_layers(config.model, tp, config.train.activation_checkpointing == "full", context)
    blocks = layers_per_part(config.model, parallel, config.train.sequence_length)
    settings = build_deepspeed_config(config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition and topology
        with torch.no_grad():  # it broadcasts tied weights
            module = PartedPipeline(
                layers,
                part_boundaries(layers, blocks),
                schedule.placement,
                topology=PipeModelDataParallelTopology(num_pp=parallel.pp, num_mp=parallel.tp, num_dp=parallel.dp),
                loss_fn=PipelineLoss(config.model.vocab_size, tp),
            )
        if isinstance(config.model, EmulatedModel):
            set_stage(module, config.model, topology.coordinate(rank).pp)
        fill_parameters(filling(module.global_parameters(), phase), config, tp, weights)
        phase("building the engine")
        optimizer = build_optimizer(config.train, module.parameters())
        shape, dtype = config.hidden_shape, dtype_of(config.train.precision)
        device = torch.device(get_accelerator().current_device_name())
        channels = Channels(topology, rank, schedule.placement, shape, dtype, device)
        scheduler = build_learning_rate(config.train, optimizer)
        engine = ScheduledEngine(schedule, channels, later, module, optimizer, scheduler, fill_in(settings))
    built = DeepSpeedEngine(config, engine, module, topology, tp, blocks, settings, context)
    if weights is None and config.model.weights is not None and config.train.precision != "fp32":
        phase("reading the weights in full precision")
        fill_masters(built)
    built.compilation = compile_blocks(module, config, tp, device, phase)
    return built


class DeepSpeedEngine:
    """An `Engine`: `PipelineEngine`, and what it lacks."""

    def __init__(
        self,
        config: RunConfig,
        engine: ScheduledEngine,
        module: PartedPipeline,
        topology: Topology,
        tp: TensorParallel,
        blocks_per_part: list[int],
        settings: dict[str, Any],
        context: PassContext,
    ) -> None:
        self.config, self.topology, self.tp, self.context = config, topology, tp, context
        self.blocks_per_part = blocks_per_part
        self.settings: dict[str, Any] | None = settings
        self.compilation: Compilation | None = None
        self.observers = engine.observers
        self._engine, self._module = engine, module
        self._clips = not clips_by_itself(config)  # the harness does; torch's optimizer works on the parameters
        self._norm: Tensor | None = None
        if config.model.dropout > 0 or config.data.documents != "cut":
            self.observers.append(ForwardPasses(context, lambda: self.steps_taken))
        table = parameter_table(config.model)
        self._partial = [
            parameter
            for name, parameter in module.global_parameters()
            if table[name].shard_dim is None and (tp.sequence_parallel or table[name].of_heads)
        ]
        """Parameters that are whole on every rank, and their gradients not."""
        if tp.group is not None and self._partial:
            self.observers.append(Before("reduce_gradients", self._sum_over_ranks))
        if self._clips:
            self.observers.append(Before("optimizer", self._clip))

    @property
    def transport(self) -> str:
        """Of the groups of each axis."""
        parallel = self.config.parallel
        return describe_transports(
            {
                "tp": None if self.tp.group is None else self.tp.group.process_group,
                "pp": next(iter(self._engine.channels.groups), None),
                "dp": self._engine.mpu.get_data_parallel_group() if parallel.dp > 1 else None,
            }
        )

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, those that were skipped included."""
        return int(self._engine.global_steps)

    @property
    def steps_skipped(self) -> int:
        """Steps whose gradients overflowed in fp16."""
        return int(self._engine.skipped_steps)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, inside of DeepSpeed's."""
        optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimizer

    @property
    def optimizer_name(self) -> str:
        """Class of DeepSpeed's optimizer, or of torch's where there is no other."""
        return type(self._engine.optimizer).__name__

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch and wait for the device; its loss."""
        return float(self._engine.train_batch(data_iter=data))

    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, without learning from them."""
        return float(self._engine.eval_batch(data, num_micro_batches=num_micro_batches))

    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._engine.get_lr()[0])

    def gradient_norm(self) -> float | None:
        """Norm of the last step's whole gradient before clipping."""
        norm = self._norm if self._norm is not None else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with names that are the same in every layout."""
        return self._module.global_parameters()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's slices by name, before the optimizer instruction."""
        gradients = {}
        scale = getattr(self._engine.optimizer, "loss_scale", 1.0)
        for name, parameter in self.parameters():
            gradient = parameter.grad if self._clips else deepspeed.utils.safe_get_full_grad(parameter)
            gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.detach().float() / scale
        return gradients

    def optimizer_state(self, key: str) -> dict[str, Tensor]:
        """This rank's slices of the weights or of a moment, by name."""
        read = self._weight if key == "weight" else self._moment(key)
        return {name: read(parameter) for name, parameter in self.parameters()}

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        weight: Tensor = parameter.detach() if self._clips else deepspeed.utils.safe_get_full_fp32_param(parameter)
        return weight.clone()

    def _moment(self, key: str) -> Callable[[nn.Parameter], Tensor]:
        optimizer = self._engine.optimizer
        if self._clips:
            return lambda parameter: optimizer.state[parameter][key]
        # DeepSpeed links the state of the first parameter group only
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        return lambda parameter: deepspeed.utils.safe_get_full_optimizer_state(parameter, key)

    def held(self, tied_copies: bool) -> Iterator[tuple[str, Held]]:
        """By global name, for each kind of DeepSpeed optimizer."""
        groups = self.optimizer.param_groups
        for name, parameter in self.parameters():
            if getattr(parameter, "ds_pipe_replicated", False) and not tied_copies:
                continue
            if not hasattr(parameter, "_hp_mapping"):
                yield name, Held(parameter, 0, 0, parameter.numel())
            elif (mapping := parameter._hp_mapping) is not None:  # flat copies, split over replicas
                (flat,) = groups[mapping.param_group_index]["params"]
                held, own = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield name, Held(flat, own.start, held.start, held.numel)

    def progress(self) -> Progress:
        """For a checkpoint."""
        scaler = self._engine.optimizer.loss_scaler if self.config.train.precision == "fp16" else None
        return Progress(
            step=self.steps_taken,
            optimizer_step=next((int(state["step"]) for state in self.optimizer.state.values() if state), 0),
            scheduler_step=self._engine.lr_scheduler.last_epoch,
            loss_scale={key: getattr(scaler, key) for key in LOSS_SCALE_KEYS if hasattr(scaler, key)},
        )

    def restore(self, progress: Progress) -> None:
        """Go on from there."""
        engine = self._engine
        if hasattr(engine.optimizer, "update_lp_params"):
            engine.optimizer.update_lp_params()
        engine.lr_scheduler.last_epoch = progress.scheduler_step - 1
        engine.lr_scheduler.step()  # sets the learning rate
        for state in filter(None, self.optimizer.state.values()):
            state["step"].fill_(progress.optimizer_step)
        if self.config.train.precision == "fp16":
            for key, value in progress.loss_scale.items():
                setattr(engine.optimizer.loss_scaler, key, value)
        engine.global_steps = progress.step  # dropout draws by it

    def destroy(self) -> None:
        """Free the engine and its process groups, for each of which gloo keeps threads and connections."""
        engine, grid = self._engine, self._engine.grid
        engine.destroy()
        engine.total_loss = None
        own = [group.process_group for group in (self.tp.group, self.tp.kv_group) if group is not None]
        groups = [self._module.world_group, *engine.channels.groups, *own]
        groups += [grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group]
        groups += [tied["group"] for tied in self._module.tied_comms.values()]
        # In one order on all ranks: NCCL ends a communicator on all of them at once.
        for group in dict.fromkeys(group for group in groups if group is not None):
            dist.destroy_process_group(group)

    def _sum_over_ranks(self) -> None:
        """Complete gradients to which each tensor-parallel rank added what its part of the activations makes of them.

        Where the sequence is sliced, they are those of all parameters that are whole on every rank: norms, row-parallel
        biases, positions (arXiv 2205.05198); else those of norms of heads. One all-reduce per step, when the
        micro-batches are added up, makes every copy the same bits.
        """
        group, bf16 = self.tp.group, self._engine.using_bf16_optimizer
        assert group is not None
        gradients = [getattr(parameter, "_hp_grad" if bf16 else "grad") for parameter in self._partial]
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        all_reduce(summed, group)
        totals = torch.split(summed, [gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))

    def _clip(self) -> None:
        """Take the norm over the whole model, and clip by it."""
        parameters = list(self._module.parameters())
        model_group = self._engine.grid.get_model_parallel_group() if dist.get_world_size() > 1 else None
        self._norm = global_gradient_norm(parameters, self.tp.rank, model_group)
        scale_gradients(parameters, self._norm, self.config.train.gradient_clipping)
