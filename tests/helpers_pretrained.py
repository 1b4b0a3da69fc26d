"""Folders as `save_pretrained` writes them, of the families' tiny models, with random values in every tensor."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from references import MODELS, build_reference
from torch import Tensor

from harness.model.groups import TensorParallel

FAMILIES = {"gpt2": "gpt2", "llama": "llama grouped", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3",
            "bert": "bert"}  # fmt: skip
"""Family -> the model of it in `references.MODELS` that is saved."""


def reference_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of `transformers` with random values in every parameter; of those it was made with, only the class."""
    reference = build_reference(MODELS[name], bos_token_id=0, eos_token_id=1, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return reference.to(dtype)


def save_reference(folder: Path, name: str, max_shard_size: str = "1GB", **arguments: Any) -> dict[str, Tensor]:
    """What `save_pretrained` leaves of `reference_of`; its state."""
    reference = reference_of(name, **arguments)
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    return dict(reference.state_dict())


def loaded(folder: Path) -> tuple[Any, list[str]]:
    """The model that `transformers` loads from a folder by its config.json, and what it has to say about that."""
    import transformers

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        settings = transformers.AutoConfig.from_pretrained(folder)
        (name,) = settings.architectures
        with warnings.catch_warnings(action="error", category=UserWarning):
            model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    return model.eval(), said + [f"{kind}: {keys}" for kind, keys in report.items() if keys]


def place(rank: int, size: int) -> TensorParallel:
    """A rank for building and filling layers, not for running them."""
    return TensorParallel(group=None, rank=rank, size=size, kv_group=None, kv_size=1)
