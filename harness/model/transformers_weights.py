"""Weights of `transformers` models to and from ours, by name alone; no `transformers` needed.

Both sides use the same layout of heads and rotary positions, so conversion is renaming, splitting
or fusing projections, and for some (GPT-2's Conv1D) transposing: `model.architecture.transformers` says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.spec.architecture import TransformersFormat
from harness.spec.config import Model
from harness.spec.parameters import parameter_table

BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Constants in older files: causal masks and rotary frequencies."""


def to_transformers(full_state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """State for GPT2LMHeadModel or LlamaForCausalLM from full parameters by global name.

    A tied head is left out, as in files that `save_pretrained` writes.

    Raises:
        ConfigError: the shape has no counterpart in `transformers`.
    """
    written, state = _format(model), {}
    for name, spec in parameter_table(model).items():
        theirs, transposed = _counterparts(name, written)
        full = full_state[name]
        pieces = torch.split(full, [size for _, size in spec.parts]) if len(theirs) > 1 else (full,)
        for their_name, piece in zip(theirs, pieces, strict=True):
            state[their_name] = (piece.t() if transposed else piece).contiguous()
    return state


def from_transformers(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Full parameters by global name from the state of GPT2LMHeadModel or LlamaForCausalLM.

    Takes GPT-2 files whose names lack the prefix `transformer.`, and ignores the copy of a tied head.

    Raises:
        ConfigError: weights are missing, of another shape, or left over.
    """
    written = _format(model)
    left = {_with_prefix(name, written): tensor for name, tensor in state.items() if not BUFFERS.search(name)}
    if model.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    full_state = {}
    for name, spec in parameter_table(model).items():
        theirs, transposed = _counterparts(name, written)
        missing = [their_name for their_name in theirs if their_name not in left]
        if missing:
            raise ConfigError(f"the weights have no {missing[0]}; the files are not those of model={model.name}")
        full = torch.cat([left.pop(their_name) for their_name in theirs])
        full = full.t().contiguous() if transposed else full
        if tuple(full.shape) != spec.shape:
            raise ConfigError(
                f"{theirs[0]} has shape {tuple(full.shape)}, but model={model.name} needs {spec.shape}; "
                "use the config.json that belongs to the weights"
            )
        full_state[name] = full
    if left:
        raise ConfigError(f"the weights hold {min(left)}, which model={model.name} does not have")
    return full_state


def _format(model: Model) -> TransformersFormat:
    """How its family is written there.

    Raises:
        ConfigError: it is not, or not in this shape.
    """
    written = model.architecture.transformers
    if written is None:
        raise ConfigError(f"model={model.name} has no counterpart in transformers: {model.architecture.summary}")
    grouped = model.num_key_value_heads != model.num_attention_heads
    widened = model.num_attention_heads * model.head_dim != model.hidden_size
    if (grouped and "num_key_value_heads" not in written.keys) or (widened and "head_dim" not in written.keys):
        raise ConfigError(
            f"model={model.name} can't be a {model.family} of transformers, which has as many key-value heads as heads "
            "and head_dim = hidden_size / num_attention_heads; use family=llama"
        )
    return written


def _counterparts(name: str, written: TransformersFormat) -> tuple[list[str], bool]:
    """Names in `transformers` of a parameter of ours, and whether the matrix is transposed there."""
    path, _, leaf = name.rpartition(".")
    index = ""
    if path.startswith("blocks."):
        _, index, path = path.split(".", 2)
    theirs = [f"{module.format(i=index)}.{leaf}" for module in written.modules[path]]
    return theirs, path in written.transposed and leaf == "weight"


def _with_prefix(name: str, written: TransformersFormat) -> str:
    has_it = name.startswith((written.optional_prefix, *written.modules["head"]))
    return name if has_it else written.optional_prefix + name
