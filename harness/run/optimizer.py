"""Optimizer and learning rate: torch's own, handed to DeepSpeed ready-made."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from harness.spec.config import Train

FINAL_LEARNING_RATE = 0.1  # of the peak, where cosine decay ends


def learning_rate_factor(train: Train, step: int) -> float:
    """Share of `train.learning_rate` used by a step (counted from 0): linear rise, then the decay."""
    rise = train.learning_rate_warmup_steps
    if step < rise:
        return (step + 1) / rise
    if train.learning_rate_decay == "constant":
        return 1.0
    progress = min(1.0, (step - rise) / max(1, train.steps - rise))
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(train: Train, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or plain SGD; AdamW decays matrices only."""
    parameters = list(parameters)
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    first, second = train.adam_betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(first, second),
        eps=train.adam_epsilon,
        fused=True,
    )


def build_learning_rate(train: Train, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Scheduler that follows `learning_rate_factor`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(train, step))
