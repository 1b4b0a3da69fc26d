"""Perplexity of held-out text, measured in the layout that generates: as configured, and in full precision."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from harness.machine import Machine
from harness.model.loss import IGNORE_INDEX, vocab_parallel_cross_entropy
from harness.record.heartbeat import Heart
from harness.record.inference import HeldOut
from harness.run.data import Sample
from harness.run.inference.ring import Ring
from harness.run.inference.stage import Stage
from harness.run.instruments.heartbeat import HeartbeatObserver
from harness.spec.batching import Passes, Row, Work
from harness.spec.config import RunConfig
from harness.spec.generation import in_full_precision, rounds


def measure_perplexity(
    config: RunConfig, rank: int, samples: Sequence[Sample], source: str, heart: Heart, machine: Machine
) -> HeldOut:
    """Mean losses of samples, equal on all ranks; a collective call of all.

    Each model is built for it and freed before the next one: memory holds one at a time.

    Args:
        source: of the samples, in words.
    """
    num_tokens = sum(int((sample.targets != IGNORE_INDEX).sum()) for sample in samples)
    losses = []
    for variant in [in_full_precision(config), *([config] if rounds(config) else [])]:
        losses.append(_sum_of_losses(variant, rank, samples, heart, machine) / num_tokens)
        gc.collect()  # a ring and its stage know each other
    return HeldOut(losses[-1], losses[0], num_tokens, source)


def _sum_of_losses(config: RunConfig, rank: int, samples: Sequence[Sample], heart: Heart, machine: Machine) -> float:
    prompts, vocab_size = [sample.inputs.tolist() for sample in samples], config.model.vocab_size
    stage = Stage(config, rank, prompts, None, phase=heart.phase)
    heart.phase("meeting the other stages")
    ring = Ring(stage, rank, prompts, most_rows=1)
    ring.observers.append(HeartbeatObserver(heart, lambda: 0, machine.device_kind))
    losses: list[float] = []

    def note(work: Work, scores: Tensor) -> None:
        (row,) = work.rows
        targets = torch.from_numpy(samples[row.request].targets).unsqueeze(0).to(scores.device)
        losses.append(float(vocab_parallel_cross_entropy(scores, targets, vocab_size, stage.tp).double().sum()))

    stage.scored = note
    works = [Work(n, "prefill", (Row(0, n, 0, len(prompt), False),)) for n, prompt in enumerate(prompts)]
    ring.run(Passes(works) if rank == 0 else None, lambda _: None)
    shared = [sum(losses)]  # known to the last stage
    dist.broadcast_object_list(shared, src=ring.topology.groups("tp")[-1][0])
    ring.destroy()
    return shared[0]
