"""Gradient clipping by the norm over the whole model, whatever the layout.

DeepSpeed's fp32 pipeline path clips every stage by the norm of its own part, so this path clips here;
the optimizers of the other precisions take the global norm themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def global_gradient_norm(
    parameters: Iterable[torch.nn.Parameter], tp_rank: int, model_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """2-norm of the gradient over all stages and tensor-parallel ranks.

    A parameter replicated over tensor-parallel ranks counts on the first of them, and a tied one on the
    first stage that holds it (`ds_pipe_replicated` marks the others).

    Args:
        parameters: this rank's, with gradients already averaged over data-parallel ranks.
        model_group: ranks of all stages and tensor-parallel ranks of one replica.

    Returns:
        0-dim float32 tensor, equal on every rank of the group.
    """
    counted = [
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None
        and (tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
        and not getattr(parameter, "ds_pipe_replicated", False)
    ]
    norm = torch.nn.utils.get_total_norm(counted)
    squared = norm.float().square()
    if model_group is not None and dist.get_world_size(model_group) > 1:
        dist.all_reduce(squared, group=model_group)
    return squared.sqrt()


def scale_gradients(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Shrink gradients in place so that their global norm is at most `max_norm`; 0 changes nothing."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
