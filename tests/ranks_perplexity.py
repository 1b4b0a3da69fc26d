"""Rank program of test_perplexity.py: losses on held-out text in layouts of as many ranks as there are."""

from __future__ import annotations

import os
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from helpers import make_config

from harness.machine import detect_machine
from harness.record.heartbeat import Heart
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.inference import perplexity
from harness.run.inference.stage import Stage
from harness.run.tasks.generate import perplexity_of

built: list[weakref.ref[Stage]] = []


class OnlyStage(Stage):
    """A stage that finds none beside it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        assert all(other() is None for other in built), "the one before is still in memory"
        built.append(weakref.ref(self))
        super().__init__(*arguments, **named)


def run(argument: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    initialize_distributed()
    perplexity.Stage = OnlyStage  # type: ignore[misc]
    heart = Heart(folder, rank := int(os.environ["RANK"]))
    answers = {}
    for name, overrides in argument.items():
        built.clear()
        found = perplexity_of(make_config("task=generate", *overrides), rank, heart, detect_machine())
        answers[name] = {"stages": len(built)} | (asdict(found) if found is not None else {})
    return answers
