"""Training in plain torch: the engine of one rank, and what torch's own kinds of parallelism share with it.

Parity compares every layout with one rank of it in float64 (`harness.run.parity.Reference`). What the layout under test
takes from the harness is therefore done in another way here: the loss is `F.cross_entropy` over the valid targets that
are counted in the batch, and clipping is torch's. (The order of a step is the schedule's; parity's reference has its
own, and its own optimizer.)

`pipelining.py`, `tensor_parallel.py` and `data_parallel.py` beside it are what users of torch would write instead of
using this harness. They are there to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from harness.model.assembly import build_layers
from harness.model.context import PassContext
from harness.model.emulated import set_stage
from harness.model.groups import TensorParallel
from harness.model.loss import IGNORE_INDEX
from harness.record.heartbeat import Phase
from harness.run.compilation import Compilation, compile_blocks
from harness.run.data import MicroBatch
from harness.run.engines.engine import Held, Observers, Progress, device_of_rank, filling
from harness.run.optimizer import build_optimizer, learning_rate_factor
from harness.run.shared_memory import transport_of
from harness.run.weights import fill_parameters
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, build_schedule, evaluation
from harness.spec.topology import Topology

E = TypeVar("E", bound="TorchEngine")


def build_as(kind: type[E], config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> E:
    """As `harness.run.engines.engine.build_engine`, an engine of a kind, on this rank's device."""
    device = device_of_rank()
    peak = config.train.learning_rate
    engine = kind(
        config,
        lambda step: peak * learning_rate_factor(config.train, step),
        weights,
        device=device,
        phase=phase,
        rank=rank,
    )
    engine.compilation = compile_blocks(engine.model, config, engine.tp, device, phase)
    return engine


class TorchEngine:
    """An `Engine` of one rank, which takes the micro-batches of all replicas one after the other.

    Args:
        learning_rates: of each step, counted from 0.
        weights: full parameter by global name; None draws fresh ones.
        dtype: of parameters, optimizer and computation.
        phase: told what is done next, parameter by parameter.
        rank: of those who train together.
    """

    is_parallel = False
    """Whether all ranks train together."""

    def __init__(
        self,
        config: RunConfig,
        learning_rates: Callable[[int], float],
        weights: Callable[[str], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        phase: Phase = lambda _: None,
        rank: int = 0,
    ) -> None:
        self.config, self.dtype, self.device, self.rank = config, dtype, device or torch.device("cpu"), rank
        self.topology, self.tp = Topology(pp=1, dp=1, tp=1), TensorParallel.single()
        self.backend = "gloo" if self.device.type == "cpu" else "nccl"
        self.group = dist.new_group(backend=self.backend) if self.is_parallel else None
        self.blocks_per_part = [config.model.num_hidden_layers]
        self.settings: dict[str, Any] | None = None
        self.compilation: Compilation | None = None
        self.observers = Observers()
        self.steps_taken = self.steps_skipped = 0
        self._learning_rates, self._num_scheduled = learning_rates, 0
        phase("building the model")
        self.context = PassContext(config.train.seed)
        self.model = self._build_model()
        fill_parameters(filling(self.parameters(), phase), config, self.tp, weights)
        phase("building the engine")
        self.optimizer = self._build_optimizer()
        self._norm: Tensor | None = None
        self._batch: list[MicroBatch] = []
        """Of the step: all its micro-batches on this rank."""
        self._valid = 1.0
        """What the sum of their losses is divided by."""
        self._losses: dict[int, Tensor] = {}
        """By micro-batch, [sample]: parts of the batch's loss, where backward passes begin."""
        self._total = torch.zeros(())
        """Their sum so far."""

    def _build_model(self) -> nn.Module:
        """With uninitialized weights."""
        model, train = self.config.model, self.config.train
        layers = build_layers(model, self.tp, train.activation_checkpointing == "full", self.context)
        if isinstance(model, EmulatedModel):
            set_stage(layers, model, 0)
        return layers.to(self.device, self.dtype)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.config.train, (parameter for _, parameter in self.parameters()))

    @property
    def transport(self) -> str:
        """That of torch."""
        return "" if self.group is None else transport_of(self.group)

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer."""
        return type(self.optimizer).__name__

    @property
    def _num_micro_batches(self) -> int:
        """That this rank takes: of all replicas."""
        return self.config.train.global_batch_size // self.config.train.micro_batch_size

    # --- a step

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch; its loss."""
        self.model.train()
        self._begin()
        self._execute(self.instructions(self._num_micro_batches), data)
        self.steps_taken += 1
        return float(self._total)

    def instructions(self, num_micro_batches: int) -> list[Instruction]:
        """Of a step: those of the configured schedule for its only stage."""
        return build_schedule(self.config.parallel.schedule, 1, num_micro_batches).stages[0]

    @torch.no_grad()
    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, without learning from them."""
        self.model.eval()
        self._begin()
        passes = evaluation(Placement(1), num_micro_batches).stages[0]
        self._execute([*passes, Instruction("reduce_loss")], data)
        return float(self._total)

    def _begin(self) -> None:
        self._batch, self._total = [], torch.zeros((), dtype=torch.float64, device=self.device)

    def _execute(self, instructions: Sequence[Instruction], data: Iterator[MicroBatch]) -> None:
        """Do what a schedule says; the first `load` draws the whole batch, to count its targets."""
        num_micro_batches = sum(instruction.kind == "load" for instruction in instructions)
        functions: dict[str, Callable[[int], Any]] = {
            "load": lambda number: self._load(number, data, num_micro_batches),
            "forward": self._forward,
            "backward": lambda number: self.backward(self._losses.pop(number)),
            "reduce_tied_gradients": lambda _: self._reduce_tied_gradients(),
            "reduce_gradients": lambda _: self._reduce_gradients(),
            "optimizer": lambda _: self._take_step(),
            "reduce_loss": lambda _: self._reduce_loss(),
        }
        for instruction in instructions:
            act = partial(functions[instruction.kind], instruction.micro_batch)
            self.observers.execute(instruction, act)

    def _load(self, number: int, data: Iterator[MicroBatch], num_micro_batches: int) -> None:
        if not self._batch:
            self._batch = [next(data) for _ in range(num_micro_batches)]
            self._valid = self._count_valid()
        tokens, (targets, weight) = self._batch[number]
        self._batch[number] = tokens.to(self.device), (targets.to(self.device), weight)

    def _count_valid(self) -> float:
        """Targets of the batch that the loss counts."""
        return sum(int((targets != IGNORE_INDEX).sum()) for _, (targets, _) in self._batch)

    def _forward(self, number: int) -> None:
        tokens, (targets, _) = self._batch[number]
        of_replica, self.context.dp_rank = self._place(number)
        self.context.forward_pass = (self.steps_taken, of_replica)
        losses = self.losses(tokens, targets) / self._valid
        self._total += losses.sum().detach()
        if torch.is_grad_enabled():
            self._losses[number] = losses

    def _place(self, number: int) -> tuple[int, int]:
        """Number and replica of a micro-batch, by which dropout draws."""
        return divmod(number, self.config.parallel.dp)  # they are dealt out to the replicas in turns

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sums of token losses of a micro-batch, [sample] or [1]."""
        return cross_entropy(self.model(tokens)[..., : self.config.model.vocab_size], targets)

    def backward(self, losses: Tensor) -> None:
        """Add to the gradients.

        Args:
            losses: [sample], parts of the loss.
        """
        torch.autograd.backward(losses.sum())

    def _reduce_tied_gradients(self) -> None:
        """Of weights that two ranks hold; one rank has none."""

    def _reduce_gradients(self) -> None:
        """Of ranks that have seen different samples; one rank has nobody to do it with."""

    def _reduce_loss(self) -> None:
        """Wait for the device, and for those whose losses add up to that of the batch."""
        self._total = self._total.cpu()

    def _take_step(self) -> None:
        parameters = [parameter for _, parameter in self.parameters()]
        self._norm = self._gradient_norm()
        if self.config.train.gradient_clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.train.gradient_clipping, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._num_scheduled += 1

    def _gradient_norm(self) -> Tensor:
        """Of the whole gradient."""
        return torch.nn.utils.get_total_norm(gradients_of(self.parameters()))

    def learning_rate(self) -> float:
        """Of the next step."""
        return self._learning_rates(self._num_scheduled)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        return None if self._norm is None else float(self._norm)

    # --- what this rank holds

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's by name."""
        return self.model.named_parameters()

    def gradients(self) -> dict[str, Tensor]:
        """Copies by name, before the optimizer instruction, which forgets them."""
        return {name: p.grad.clone() for name, p in self.parameters() if p.grad is not None}

    def optimizer_state(self, key: str) -> dict[str, Tensor]:
        """Copies of the weights or of a moment, by name."""
        if key == "weight":
            return {name: p.detach().clone() for name, p in self.parameters()}
        return {name: self.optimizer.state[p][key] for name, p in self.parameters()}

    def held(self, tied_copies: bool) -> Iterator[tuple[str, Held]]:
        """All of everything."""
        for name, parameter in self.parameters():
            yield name, Held(parameter, 0, 0, parameter.numel())

    def progress(self) -> Progress:
        """For a checkpoint."""
        counted = next((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), 0)
        return Progress(self.steps_taken, counted, self._num_scheduled, {})

    def restore(self, progress: Progress) -> None:
        """Go on from there."""
        self.steps_taken, self._num_scheduled = progress.step, progress.scheduler_step
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(progress.optimizer_step)

    def destroy(self) -> None:
        """Leave the group; memory goes with the last reference."""
        if self.group is not None:
            dist.destroy_process_group(self.group)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums of token losses, [sample].

    Args:
        logits: [batch, sequence, vocabulary].
        targets: [batch, sequence]; `IGNORE_INDEX` where a token is not learned from.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(len(targets), -1).sum(dim=1)


def gradients_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
    """The gradients there are."""
    return [parameter.grad for _, parameter in parameters if parameter.grad is not None]


def norm_over_ranks(gradients: list[Tensor], device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """2-norm of gradients of which each number is given by one rank of a group; equal on all, a collective call."""
    squared = torch.nn.utils.get_total_norm(gradients).square().to(device)
    dist.all_reduce(squared, group=group)
    return squared.sqrt()
