"""Blocks by torch.compile: once for all of a rank, before the first step, so that no step waits for the compiler.

torch's compiler remembers what it compiled by the code, and all blocks of a model have the same. So one of them does a
forward and a backward pass ahead of the others. What communicates, draws masks or leaves work for later stays outside
of what is compiled (`torch.compiler.disable`); with a schedule that splits backward passes all matrix products do, and
so do those that go through oneDNN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.model.block import TransformerBlock
from harness.model.collectives import all_reduce
from harness.model.groups import TensorParallel
from harness.model.precision import dtype_of
from harness.record.heartbeat import Phase, name_ranks
from harness.record.sources import Compiled
from harness.spec.config import RunConfig


class Compilation(NamedTuple):
    """What compiling took on one rank, and what came of it."""

    seconds: float
    """Until a block had done both passes."""
    failure: str | None
    """Why it could not be; None: it could."""
    is_used: bool
    """Whether the rank trains with it; not where a tensor-parallel neighbour failed."""


def compile_blocks(
    module: nn.Module, config: RunConfig, tp: TensorParallel, device: torch.device, phase: Phase
) -> Compilation | None:
    """Let blocks train through torch.compile, if `model.compile` says so; evaluations don't. Collective.

    Args:
        module: of the engine, its blocks where and in the type in which they train.
        phase: told of each part that is compiled.
    """
    if not config.model.compile:
        return None
    phase("compiling the block")
    start = time.monotonic()
    torch._dynamo.reset()  # what another engine compiled in this process counts towards a limit
    blocks = [block for block in module.modules() if isinstance(block, TransformerBlock)]
    backend = _Inductor(phase)
    hidden = torch.zeros(config.hidden_shape, dtype=dtype_of(config.train.precision), device=device)
    try:
        _make_tables(blocks, hidden)
        for block in blocks:
            block.compiled = torch.compile(block.compute, backend=backend, dynamic=False)
        output = blocks[0](hidden.requires_grad_())
        torch.autograd.grad(output, hidden, torch.zeros_like(output))  # no parameter's hook hears of it
    except Exception as error:  # of the compiler itself, so that all ranks of a layer meet it
        backend.failure = _described(error)
    if tp.later is not None:
        tp.later.take()
    is_used = _is_used_by_all(backend.failure is None, tp, device)
    if not is_used:
        for block in blocks:
            block.compiled = None
    return Compilation(time.monotonic() - start, backend.failure, is_used)


def _is_used_by_all(works: bool, tp: TensorParallel, device: torch.device) -> bool:
    """Tensor-parallel ranks compute in one way: their copies of norms would drift apart by roundings."""
    failed = torch.tensor([0.0 if works else 1.0], device=device)
    if tp.group is not None:
        all_reduce(failed, tp.group)
    return not failed.item()


@torch.no_grad()
def _make_tables(blocks: list[TransformerBlock], hidden: Tensor) -> None:
    """What blocks make when they first compute and keep, as rotary positions do, is not to be compiled."""
    for block in blocks:
        block(hidden)


class _Inductor:
    """torch's own compiler; what it can't compile runs as it is, for the other ranks may be waiting in a collective."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self.num_graphs = 0
        self.failure: str | None = None
        """The first."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        self._phase(f"compiling part {self.num_graphs} of the block")
        inductor = torch._dynamo.lookup_backend("inductor")
        try:  # the backward pass now, too, not when it first runs
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                compiled: Callable[..., Any] = inductor(graph, inputs)
                return compiled
        except Exception as error:
            self.failure = self.failure or _described(error)
            return graph.forward


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def gather_compilation(own: Compilation | None, group: dist.ProcessGroup | None) -> Compiled | None:
    """What rank 0 records of all ranks; None on the others, and where nothing was to be compiled. Collective.

    Args:
        group: all ranks, with a backend for what lies in host memory.
    """
    if own is None:
        return None
    rank = dist.get_rank()
    if own.failure is not None:
        print(f"warning: model.compile=true failed on rank {rank}, which computes without: {own.failure}", flush=True)
    ranks: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(own, ranks, dst=0, group=group)
    if ranks is None:
        return None
    outcome = "yes"
    if without := [number for number, found in enumerate(ranks) if not found.is_used]:
        outcome = f"not on {name_ranks(without)}: {next(found.failure for found in ranks if found.failure is not None)}"
    return Compiled(max(found.seconds for found in ranks), outcome)
