"""A transformer block that waits instead of computing, for measurements whose truth is known."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.model.block import TransformerBlock
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.spec.config import EmulatedModel


class EmulatedBlock(TransformerBlock):
    """Adds a learned vector [hidden], and takes a set time for it, forward and backward.

    The waits are a sequence of the block's own, the same in every layout. Half of a backward wait belongs to the
    weights where a schedule computes their gradients later. Of a micro-batch with padding a pass takes the share that
    is none, forward and backward, as kernels that skip padding would.
    """

    factor: float = 1.0
    """What the waits are multiplied by."""

    def __init__(
        self,
        model: EmulatedModel,
        tp: TensorParallel,
        activation_checkpointing: bool,
        name: str = "block",
        context: PassContext | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nothing of what a block computes with
        self.activation_checkpointing = activation_checkpointing
        self.context = context or PassContext()
        self.parts, self.later = tp.parts, tp.later
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self._model = model
        self._random = random.Random(name)

    def compute(self, hidden: Tensor) -> Tensor:
        """Wait."""
        output: Tensor = _Wait.apply(hidden + self.weight, self)  # type: ignore[no-untyped-call]
        return output

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds * self.factor * (1 + self._model.jitter * self._random.uniform(-1, 1)))

    def wait_forward(self, share: float) -> None:
        """Take the time of a forward pass.

        Args:
            share: of the positions of its micro-batch that are no padding.
        """
        self._wait(self._model.forward_seconds * share)

    def wait_backward(self, share: float) -> None:
        """Take the time of a backward pass, or of its first half; `share` as in `wait_forward`."""
        seconds = self._model.backward_seconds * share
        if self.later is None:
            self._wait(seconds)
            return
        self._wait(seconds / 2)
        self.later.leave(partial(self._wait_for_weights, seconds / 2))

    def _wait_for_weights(self, seconds: float) -> list[Tensor]:
        self._wait(seconds)
        return []


def set_stage(module: nn.Module, model: EmulatedModel, stage: int) -> None:
    """Give the blocks of a pipeline stage the factor of that stage."""
    if model.stage_factors is not None:
        for block in module.modules():
            if isinstance(block, EmulatedBlock):
                block.factor = model.stage_factors[stage]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, block: EmulatedBlock) -> Tensor:
        ctx.block, ctx.share = block, block.context.share  # by the backward pass, the context is in another forward
        block.wait_forward(ctx.share)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.block.wait_backward(ctx.share)
        return gradients[0], None
