"""Training in plain torch on one rank: no parallelism, and none of the harness's loss, clipping or optimizer policy.

Parity compares every layout with it, in float64; `parallel.engine=torch` trains with it, in fp32. What the layout under
test takes from the harness is therefore done in another way here: the loss is `F.cross_entropy` over the valid targets
that are counted in the batch, weight decay goes by the names of parameters, and clipping is torch's. (The order of a
step is the schedule's; parity's reference has its own.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.machine import detect_machine
from harness.model.assembly import build_layers
from harness.model.dropout import RandomStreams
from harness.model.emulated import set_stage
from harness.model.groups import TensorParallel
from harness.model.loss import IGNORE_INDEX
from harness.model.weights import initialize, load_full
from harness.record.heartbeat import Phase
from harness.run.data import MicroBatch
from harness.run.engines.engine import Held, Observers, Progress, filling
from harness.run.optimizer import learning_rate_factor
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.parameters import parameter_table
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, build_schedule, evaluation
from harness.spec.topology import Topology

IDLE = ("reduce_tied_gradients", "reduce_gradients")
"""What one rank has nobody to do with."""
DECAYING = ("embedding.weight", "head.weight", "qkv.weight", "output.weight", "up.weight", "down.weight")
"""How the names of parameters end to which AdamW's weight decay applies: matrices, embeddings among them."""


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> TorchEngine:
    """As `harness.run.engines.engine.build_engine`."""
    on_gpu = detect_machine().device_kind == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    peak = config.train.learning_rate
    return TorchEngine(
        config,
        lambda step: peak * learning_rate_factor(config.train, step),
        weights,
        device=device,
        phase=phase,
    )


class TorchEngine:
    """An `Engine` of one rank, which takes the micro-batches of all replicas one after the other.

    Args:
        learning_rates: of each step, counted from 0.
        weights: full parameter by global name; None draws fresh ones.
        dtype: of parameters, optimizer and computation.
        phase: told what is done next, parameter by parameter.
    """

    def __init__(
        self,
        config: RunConfig,
        learning_rates: Callable[[int], float],
        weights: Callable[[str], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        phase: Phase = lambda _: None,
    ) -> None:
        self.config, self.device = config, device or torch.device("cpu")
        self.topology, self.tp = Topology(pp=1, dp=1, tp=1), TensorParallel.single()
        self.blocks_per_part = [config.model.num_hidden_layers]
        self.settings: dict[str, Any] | None = None
        self.observers = Observers()
        self.steps_taken = self.steps_skipped = 0
        self._learning_rates, self._num_scheduled = learning_rates, 0
        phase("building the model")
        checkpointing = config.train.activation_checkpointing == "full"
        self.streams = RandomStreams(config.train.seed)
        self.model = build_layers(config.model, self.tp, checkpointing, self.streams).to(self.device, dtype)
        if isinstance(config.model, EmulatedModel):
            set_stage(self.model, config.model, 0)
        named = filling(self.model.named_parameters(), phase)
        if weights is None:
            initialize(named, config.model, self.tp, config.train.seed)
        else:
            load_full(named, parameter_table(config.model), weights, self.tp)
        phase("building the engine")
        self.optimizer = self._build_optimizer()
        self._norm: Tensor | None = None

    def _build_optimizer(self) -> torch.optim.Optimizer:
        train, named = self.config.train, dict(self.model.named_parameters())
        if train.optimizer == "sgd":
            return torch.optim.SGD(named.values())
        groups = [
            {"params": [p for n, p in named.items() if n.endswith(DECAYING)], "weight_decay": train.weight_decay},
            {"params": [p for n, p in named.items() if not n.endswith(DECAYING)], "weight_decay": 0.0},
        ]
        first, second = train.adam_betas
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(first, second), eps=train.adam_epsilon, foreach=False
        )

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer."""
        return type(self.optimizer).__name__

    @property
    def _num_micro_batches(self) -> int:
        """Of all replicas."""
        return self.config.train.global_batch_size // self.config.train.micro_batch_size

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch; its loss."""
        self.model.train()
        loss = self._execute(self.instructions(self._num_micro_batches), data)
        self.steps_taken += 1
        return loss

    def instructions(self, num_micro_batches: int) -> list[Instruction]:
        """Of a step: those of the configured schedule for its only stage."""
        return build_schedule(self.config.parallel.schedule, 1, num_micro_batches).stages[0]

    @torch.no_grad()
    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, without learning from them."""
        self.model.eval()
        return self._execute(evaluation(Placement(1), num_micro_batches).stages[0], data)

    def _execute(self, instructions: list[Instruction], data: Iterator[MicroBatch]) -> float:
        """Do what a schedule says; the loss of the batch, which the first `load` draws whole, to count its targets."""
        batch: list[MicroBatch] = []
        valid = 0
        losses: dict[int, Tensor] = {}  # by micro-batch, [sample]: parts of the batch's loss
        total = torch.zeros((), dtype=torch.float64)

        def act(kind: str, number: int) -> None:
            nonlocal valid, total
            if kind == "load":
                if not batch:
                    batch.extend(next(data) for i in instructions if i.kind == "load")
                    valid = sum(int((targets != IGNORE_INDEX).sum()) for _, (targets, _) in batch)
                tokens, (targets, weight) = batch[number]
                batch[number] = tokens.to(self.device), (targets.to(self.device), weight)
            elif kind == "forward":
                losses[number] = self._forward(number, batch[number]) / valid
                total = total.to(self.device) + losses[number].sum().detach()
            elif kind == "backward":
                self.backward(losses.pop(number))
            elif kind == "optimizer":
                self._take_step()
            elif kind == "reduce_loss":
                total = total.cpu()  # waits for the device
            elif kind not in IDLE:
                raise ValueError(f"plain torch has no instruction {kind!r}")

        for instruction in instructions:
            self.observers.execute(instruction, partial(act, instruction.kind, instruction.micro_batch))
        return float(total)

    def _forward(self, number: int, micro_batch: MicroBatch) -> Tensor:
        """Sums of token losses, [sample]."""
        tokens, (targets, _) = micro_batch
        # Micro-batches are dealt out to the replicas in turns; only dropout cares which is where.
        of_replica, self.streams.dp_rank = divmod(number, self.config.parallel.dp)
        self.streams.forward_pass = (self.steps_taken, of_replica)
        logits = self.model(tokens)[..., : self.config.model.vocab_size]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(len(tokens), -1).sum(dim=1)

    def backward(self, losses: Tensor) -> None:
        """Add to the gradients.

        Args:
            losses: [sample], parts of the loss.
        """
        torch.autograd.backward(losses.sum())

    def _take_step(self) -> None:
        parameters = list(self.model.parameters())
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.train.gradient_clipping > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.train.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._num_scheduled += 1

    def learning_rate(self) -> float:
        """Of the next step."""
        return self._learning_rates(self._num_scheduled)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        return None if self._norm is None else float(self._norm)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by name."""
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
        """There are no process groups; memory goes with the last reference."""
