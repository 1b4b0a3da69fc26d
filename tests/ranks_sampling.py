"""Rank program: tokens that groups of 2, 3 and 4 ranks choose, each rank from its columns of the same scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from harness.model.groups import Group, TensorParallel
from harness.model.sampling import Sampler
from harness.spec.config import Generate

LAYOUTS = {2: [[0, 1], [2, 3]], 3: [[0, 1, 2]], 4: [[0, 1, 2, 3]]}
"""Ranks of the groups, by their size."""


def run(argument: list[dict[str, Any]], folder: Path) -> list[dict[str, list[list[int]]]]:
    """By settings, then by layout, what each rank has chosen."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {tp: [dist.new_group(ranks) for ranks in members] for tp, members in LAYOUTS.items()}
    own = {}
    for tp, members in LAYOUTS.items():
        for group, ranks in zip(groups[tp], members, strict=True):
            if dist.get_rank() in ranks:
                own[tp] = TensorParallel(Group(group), ranks.index(dist.get_rank()), tp, None, 1)
    answers = []
    for case in argument:
        tokens = {tp: choose(case, handle) for tp, handle in own.items()}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, tokens)
        answers.append({str(tp): [rank[tp] for rank in gathered if tp in rank] for tp in LAYOUTS})
    return answers


def choose(case: dict[str, Any], tp: TensorParallel) -> list[int]:
    """2,000 tokens: those of 400 sequences at 5 positions.

    Args:
        case: `settings`, `vocab_size`, and either `equal` scores, or those of layouts differ by rounding.
    """
    settings, vocab_size = Generate(**case["settings"]), case["vocab_size"]
    sampler = Sampler(settings, vocab_size, tp)
    chosen: list[int] = []
    for position in range(7, 12):
        generator = torch.Generator().manual_seed(position)
        logits = 2 * torch.randn(400, vocab_size, generator=generator)
        seen = torch.rand(logits.shape, generator=generator) < 0.2
        logits = logits.round() if case["equal"] else logits * (1 + 1e-6 * noise(logits.shape, tp.size))
        logits, seen = column(logits, tp), column(seen, tp)
        chosen += sampler.choose(
            logits, range(400), [position] * 400, seen if settings.repetition_penalty != 1 else None
        ).tolist()
    return chosen


def noise(shape: torch.Size, seed: int) -> Tensor:
    """Uniform over -1 ... 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)


def column(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """A rank's part; the padding would win if it were looked at."""
    padding = -tensor.shape[-1] % tp.size
    padded = F.pad(tensor, (0, padding), value=True if tensor.dtype == torch.bool else math.inf)
    return padded.chunk(tp.size, dim=-1)[tp.rank].clone()
