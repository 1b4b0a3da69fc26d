"""Rank program: `runs`, trainings one after the other in one process group; answers with their lines of metrics.jsonl.

`copies` load a checkpoint and write it again. With `hang_at_step` the last rank stops for good in the middle of
writing the checkpoint of that step. With `slow_seconds` its steps end so much later, outside of all collectives, and
with `large_bytes` it holds so much more memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from helpers import make_config

import harness.run.tasks.train
from harness.record.store import Attempt, read_jsonl
from harness.run.checkpoint import load_checkpoint, save_checkpoint
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.engines.engine import build_engine


def run(argument: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    initialize_distributed()
    rank = int(os.environ["RANK"])
    is_last = rank == int(os.environ["WORLD_SIZE"]) - 1
    if (step := argument.get("hang_at_step")) and is_last:
        hang_in_checkpoint(step)
    if (seconds := argument.get("slow_seconds")) and is_last:
        end_steps_late(seconds)
    hoard = b"x" * argument.get("large_bytes", 0) if is_last else b""
    curves = []
    for name, overrides in argument["runs"]:
        attempt = Attempt(folder / name)
        attempt.path.mkdir(parents=True, exist_ok=True)
        harness.run.tasks.train.train(attempt, make_config(*overrides), rank)
        curves.append(read_jsonl(attempt.metrics_file))
    for name, overrides in argument.get("copies", ()):
        config = make_config(*overrides)
        engine = build_engine(config, rank)
        step = load_checkpoint(Path(str(config.train.resume)), engine, config, None)
        save_checkpoint(folder / name / "checkpoints", engine, config, step, None)
    del hoard
    return curves


def end_steps_late(seconds: float) -> None:
    train_batch = PipelineEngine.train_batch

    def slow(*arguments: Any, **named: Any) -> Any:
        loss = train_batch(*arguments, **named)
        time.sleep(seconds)
        return loss

    PipelineEngine.train_batch = slow


def hang_in_checkpoint(at_step: int) -> None:
    save_tensor = torch.save
    calls: list[Any] = []

    def save_some(tensor: Any, file: Any) -> None:
        calls.append(None)
        while len(calls) > 10:
            time.sleep(1)
        save_tensor(tensor, file)

    def save(*arguments: Any) -> None:
        if arguments[3] == at_step:
            torch.save = save_some
        save_checkpoint(*arguments)

    harness.run.tasks.train.save_checkpoint = save
