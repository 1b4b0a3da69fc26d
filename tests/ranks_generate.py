"""Rank program of test_generation.py: what rings of any layout make of prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import make_config
from helpers_model import random_state
from references import MODELS

from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.inference.ring import Ring
from harness.run.inference.stage import Stage
from harness.spec.batching import Batcher, Chosen
from harness.spec.config import Model, RunConfig
from harness.spec.kv_cache import limits

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 96,
    "vocab_size": 211, "max_position_embeddings": 48,
}  # fmt: skip


def run(argument: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    initialize_distributed()
    return {name: sequences(case, int(os.environ["RANK"])) for name, case in argument.items()}


def shape_of(name: str) -> Model:
    """A model of `references` with four layers."""
    wide = {"head_dim": 16} if name == "qwen3" else {}
    window = {"sliding_window": 9} if name == "mistral" else {}
    return MODELS[name].model_copy(update=SHAPE | wide | window)


def config_of(case: dict[str, Any]) -> RunConfig:
    """Whatever the machine has."""
    config = make_config()
    parallel = config.parallel.model_copy(update={"tp": case["layout"][0], "pp": case["layout"][1]})
    generate = config.generate.model_copy(update=case.get("generate", {}))
    return config.model_copy(update={"model": shape_of(case["model"]), "parallel": parallel, "generate": generate})


def sequences(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Tokens and reasons of each prompt, known to rank 0, and bytes of every rank's cache; a collective call."""
    config, prompts, stops = config_of(case), case["prompts"], case.get("stops", [])
    settings, lengths = config.generate, [*map(len, case["prompts"])]
    num_slots = min(settings.batch_size, len(prompts))
    stage = Stage(config, rank, prompts, num_slots, weights=random_state(config.model).__getitem__)
    ring = Ring(stage, rank, prompts, num_slots)
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[str | None] = [None] * len(prompts)

    def note(chosen: list[Chosen]) -> None:
        for request, token, reason in chosen:
            assert reasons[request] is None, "it had ended"
            tokens[request].append(token)
            reasons[request] = reason

    batcher = None
    if rank == 0:
        batcher = Batcher(
            lengths,
            limits(config, lengths),
            num_slots,
            min(settings.num_groups or config.parallel.pp, num_slots),
            settings.prefill_chunk,
            settings.prefill_batch_size,
            ends=lambda _, token: "stop" if token in stops else None,
            arrivals=arrivals(len(prompts), case.get("at_once", len(prompts))),
        )
    for phases in case.get("phases", [["prefill", "decode"]]):
        if batcher is not None:
            batcher.phases = frozenset(phases)
        ring.run(batcher, note)
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, stage.cache.num_bytes)
    ring.destroy()
    return {"tokens": tokens, "reasons": reasons, "bytes": everyone}


def arrivals(count: int, at_once: int) -> Callable[[bool], list[int]]:
    """So many requests at each turn."""
    waiting = [*range(count)]

    def arrive(_: bool) -> list[int]:
        now = waiting[:at_once]
        del waiting[:at_once]
        return now

    return arrive
