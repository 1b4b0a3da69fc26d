"""What trains: one interface, whoever implements it.

An engine holds this rank's part of a model and its optimizer, and executes the instructions of
`harness.spec.schedules`. Whoever wants to know what happens when, or to act between two instructions, is one of its
`observers`. Nothing outside an engine's own folder knows what it is made of. (Ranks are started by `deepspeed`
whatever the engine, and meet each other by `harness.run.engines.deepspeed.join`.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from harness.machine import detect_machine
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.products import use_onednn
from harness.record.heartbeat import Phase, no_phase
from harness.run.compilation import Compilation
from harness.run.data import MicroBatch
from harness.spec.config import RunConfig
from harness.spec.engines import engine_kind
from harness.spec.schedules import Instruction
from harness.spec.topology import Topology

T = TypeVar("T")


class Observer:
    """Is told of every instruction of an engine, on the rank that executes it; does nothing unless told otherwise."""

    def began(self, instruction: Instruction) -> None:
        """An instruction begins."""

    def ended(self, instruction: Instruction) -> None:
        """It is done; on a GPU, enqueued."""


class Observers(list[Observer]):
    """The observers of an engine. Those that came later are outside: they are told first of a begin, last of an end."""

    def execute(self, instruction: Instruction, act: Callable[[], T]) -> T:
        """Tell them that an instruction begins, do it, and tell them that it is done."""
        for observer in reversed(self):
            observer.began(instruction)
        result = act()
        for observer in self:
            observer.ended(instruction)
        return result


class Before(Observer):
    """Acts before each instruction of a kind."""

    def __init__(self, kind: str, act: Callable[[], None]) -> None:
        self._kind, self._act = kind, act

    def began(self, instruction: Instruction) -> None:
        """Act where it is the one."""
        if instruction.kind == self._kind:
            self._act()


class ForwardPasses(Observer):
    """Tells the layers which forward pass begins.

    Args:
        steps_taken: optimizer steps that the engine has taken.
    """

    def __init__(self, context: PassContext, steps_taken: Callable[[], int]) -> None:
        self._context, self._steps_taken = context, steps_taken

    def began(self, instruction: Instruction) -> None:
        """Number the pass."""
        if instruction.kind == "forward":
            self._context.forward_pass = (self._steps_taken(), instruction.micro_batch)


class Held(NamedTuple):
    """What of a parameter this rank's optimizer holds."""

    master: Tensor
    """One of its parameters, the key to its state."""
    first: int
    """Of the held range in the flattened master."""
    start: int
    """Of the held range in this rank's flattened slice of the parameter."""
    length: int


class Progress(NamedTuple):
    """How far a training has come, besides its tensors."""

    step: int
    """Optimizer steps taken, which is the position in the data, too."""
    optimizer_step: int
    """Steps that AdamW counts; fewer where a step was skipped."""
    scheduler_step: int
    """Steps that the learning rate counts."""
    loss_scale: dict[str, float]
    """State of fp16's loss scaling; empty for other precisions."""


class Engine(Protocol):
    """This rank's part of a training; what is marked collective is called by all ranks at once."""

    config: RunConfig
    topology: Topology
    tp: TensorParallel
    blocks_per_part: list[int]
    """In the order of the model (`harness.spec.placement`)."""
    settings: dict[str, Any] | None
    """What the library was given besides, for ds_config.json; secrets left out."""
    compilation: Compilation | None
    """What `harness.run.compilation.compile_blocks` says of its modules."""
    observers: Observers
    context: PassContext
    """Of the forward passes of its layers."""

    @property
    def transport(self) -> str:
        """What carries its messages between ranks, as `harness.run.shared_memory` says; empty for one rank."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, those that were skipped for an overflow included."""

    @property
    def steps_skipped(self) -> int:
        """Steps whose gradients overflowed in fp16."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, whose parameters and state are what `held` names."""

    @property
    def optimizer_name(self) -> str:
        """Class of what takes the step."""

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch and wait for the device; its loss. Collective."""

    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, weighted as they say, without learning from them. Collective."""

    def learning_rate(self) -> float:
        """Of the next step."""

    def gradient_norm(self) -> float | None:
        """Norm of the last step's whole gradient before clipping."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with names that are the same in every layout."""

    def gradients(self) -> dict[str, Tensor]:
        """This rank's slices by name, before the optimizer instruction: whole over replicas, without a loss scale."""

    def optimizer_state(self, key: str) -> dict[str, Tensor]:
        """This rank's slices of `weight` (in the optimizer's precision), `exp_avg` or `exp_avg_sq` by name."""

    def held(self, tied_copies: bool) -> Iterable[tuple[str, Held]]:
        """What this rank's optimizer holds of each parameter; nothing of some where it is sharded.

        Args:
            tied_copies: include weights whose original is on another stage.
        """

    def progress(self) -> Progress:
        """For a checkpoint."""

    def restore(self, progress: Progress) -> None:
        """Go on from there: the tensors that `held` names have been filled."""

    def destroy(self) -> None:
        """Free memory and process groups. Collective."""


Build = Callable[[RunConfig, int, "Callable[[str], Tensor] | None", Phase], Engine]


def build_engine(
    config: RunConfig,
    rank: int,
    weights: Callable[[str], Tensor] | None = None,
    phase: Phase = no_phase,
) -> Engine:
    """Build this rank's part of the model and the engine that `parallel.engine` names. Collective.

    What computes matrix products is chosen for the whole process (`harness.model.products.use_onednn`). The process
    group must exist and have `config.parallel.world_size` ranks.

    Args:
        weights: full parameter by global name; None draws fresh ones.
        phase: told what is done next, parameter by parameter.
    """
    use_onednn(config.model.onednn)
    module = importlib.import_module(engine_kind(config.parallel.engine).module)
    build: Build = module.build
    return build(config, rank, weights, phase)


def device_of_rank() -> torch.device:
    """The GPU that `initialize_distributed` gave this rank, or the CPU."""
    on_gpu = detect_machine().device_kind == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def filling(parameters: Iterable[tuple[str, nn.Parameter]], phase: Phase) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters, each announced: to draw all weights of a large model takes minutes."""
    for name, parameter in parameters:
        phase(f"filling {name}")
        yield name, parameter
