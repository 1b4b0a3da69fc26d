"""Rank program: steps of one pipeline under several schedules, one after the other in one process group.

`steps`: the gradients of a step of each configuration. `under`: the same with a trace, then a checkpoint, a step in
which one stage stands still until the others wait for it, and that step once more, without the stop, by an engine that
begins with the checkpoint. Of tensors the answer holds digests.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import make_config

from harness.checkpoints import directory_of
from harness.record.heartbeat import Heart, read_heartbeats
from harness.run.checkpoint import load_checkpoint, save_checkpoint
from harness.run.data import CorpusSamples, MicroBatch, micro_batches
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.engines.engine import Before, Engine, Observer, build_engine
from harness.run.instruments.heartbeat import HeartbeatObserver
from harness.run.instruments.tracer import HostClock, Tracer
from harness.run.tasks.train import share_corpus
from harness.spec.config import RunConfig
from harness.spec.schedules import Instruction, schedule_of

REST_SECONDS, MOST_SECONDS = 0.3, 60


class Stop(Observer):
    """Stands still before an instruction until all heartbeats have said for a while what is expected; notes them."""

    def __init__(self, instruction: Instruction, attempt: Path, expected: list[str]) -> None:
        self._instruction, self._attempt, self._expected = instruction, attempt, expected
        self.found: list[str] = []

    def began(self, instruction: Instruction) -> None:
        if instruction != self._instruction or self.found:
            return
        deadline, before = time.monotonic() + MOST_SECONDS, self.found
        while not before == self.found == self._expected and time.monotonic() < deadline:
            before = self.found
            time.sleep(REST_SECONDS)
            self.found = [str(heartbeat) for heartbeat in read_heartbeats(self._attempt)]


def run(argument: dict[str, Any], folder: Path) -> dict[str, list[Any]]:
    torch.set_num_threads(1)
    initialize_distributed()
    return {
        "steps": [_all(_step(make_config(*overrides))) for overrides in argument["steps"]],
        "under": [_all(_under(make_config(*case["overrides"]), case, folder)) for case in argument["under"]],
    }


def _all(of_rank: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, of_rank)
    return every


def _digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def _begin(config: RunConfig, first_step: int = 0) -> tuple[int, Engine, Iterator[MicroBatch]]:
    rank = int(os.environ["RANK"])
    engine = build_engine(config, rank)
    samples = CorpusSamples(config, share_corpus(config, rank))
    return rank, engine, micro_batches(config, samples, engine.topology.coordinate(rank).dp, first_step)


def _step(config: RunConfig) -> dict[str, str]:
    _, engine, data = _begin(config)
    gradients = _gradients_of_step(engine, data)
    engine.destroy()
    return gradients


def _gradients_of_step(engine: Engine, data: Iterator[MicroBatch]) -> dict[str, str]:
    found: dict[str, str] = {}
    look = Before("optimizer", lambda: found.update(_digest(engine.gradients())))
    engine.observers.append(look)
    engine.train_step(data)
    engine.observers.remove(look)
    return found


def _under(config: RunConfig, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    attempt = folder / config.parallel.schedule
    attempt.mkdir(exist_ok=True)
    rank, engine, data = _begin(config)
    tracer = Tracer(HostClock())
    tracer.attach(engine)
    tracer.start_step()
    gradients = _gradients_of_step(engine, data)
    spans = tracer.spans(1)
    save_checkpoint(attempt, engine, config, 1, None)
    stop = Stop(Instruction(*case["at"]), attempt, case["expected"])
    if rank == case["stage"]:
        engine.observers.append(stop)
    chunks = schedule_of(config).num_chunks
    engine.observers.append(HeartbeatObserver(Heart(attempt, rank), lambda: engine.steps_taken, "cpu", chunks))
    dist.barrier()  # all hearts beat
    engine.train_step(data)
    stopped = _digest(engine.optimizer_state("weight"))
    engine.destroy()
    _, engine, data = _begin(config, first_step=1)
    load_checkpoint(directory_of(attempt, 1), engine, config, None)
    engine.train_step(data)
    resumed = _digest(engine.optimizer_state("weight"))
    engine.destroy()
    return {"gradients": gradients, "spans": spans, "stands": stop.found, "stopped": stopped, "resumed": resumed}
