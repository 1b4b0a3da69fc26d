"""Weights of `transformers` models to and from ours, by name alone; no `transformers` needed.

Both sides use the same layout of heads and rotary positions, so conversion is renaming, splitting
or fusing projections, and for GPT-2 transposing (its Conv1D keeps weights [in, out]).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.model.weights import parameter_table
from harness.spec.config import Model

GPT2_NAMES = {
    "embedding": ("transformer.wte",),
    "position_embedding": ("transformer.wpe",),
    "attention_norm": ("transformer.h.{i}.ln_1",),
    "attention.qkv": ("transformer.h.{i}.attn.c_attn",),
    "attention.output": ("transformer.h.{i}.attn.c_proj",),
    "mlp_norm": ("transformer.h.{i}.ln_2",),
    "mlp.up": ("transformer.h.{i}.mlp.c_fc",),
    "mlp.down": ("transformer.h.{i}.mlp.c_proj",),
    "final_norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
LLAMA_NAMES = {
    "embedding": ("model.embed_tokens",),
    "attention_norm": ("model.layers.{i}.input_layernorm",),
    "attention.qkv": tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in ("q", "k", "v")),
    "attention.output": ("model.layers.{i}.self_attn.o_proj",),
    "mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
    "mlp.up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "mlp.down": ("model.layers.{i}.mlp.down_proj",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
}
"""Module of ours -> modules of `transformers`, one per part where it keeps parts apart."""

BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Constants in older files: causal masks and rotary frequencies."""


def to_transformers(full_state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """State for GPT2LMHeadModel or LlamaForCausalLM from full parameters by global name.

    A tied head is left out, as in files that `save_pretrained` writes.

    Raises:
        ConfigError: the shape has no counterpart in `transformers`.
    """
    _check_convertible(model)
    state = {}
    for name, spec in parameter_table(model).items():
        theirs, transposed = _counterparts(name, model)
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
    _check_convertible(model)
    left = {_with_prefix(name, model): tensor for name, tensor in state.items() if not BUFFERS.search(name)}
    if model.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    full_state = {}
    for name, spec in parameter_table(model).items():
        theirs, transposed = _counterparts(name, model)
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


def _check_convertible(model: Model) -> None:
    if model.family == "emulated":
        raise ConfigError(f"model={model.name} waits instead of computing and has no counterpart in transformers")
    grouped = model.num_key_value_heads != model.num_attention_heads
    widened = model.num_attention_heads * model.head_dim != model.hidden_size
    if model.family == "gpt2" and (grouped or widened):
        raise ConfigError(
            f"model={model.name} can't be a GPT-2 of transformers, which has as many key-value heads as heads "
            "and head_dim = hidden_size / num_attention_heads; use family=llama"
        )


def _counterparts(name: str, model: Model) -> tuple[list[str], bool]:
    """Names in `transformers` of a parameter of ours, and whether the matrix is transposed there."""
    path, _, leaf = name.rpartition(".")
    index = ""
    if path.startswith("blocks."):
        _, index, path = path.split(".", 2)
    names = (GPT2_NAMES if model.family == "gpt2" else LLAMA_NAMES)[path]
    is_conv1d = model.family == "gpt2" and path.startswith(("attention.", "mlp."))
    return [f"{their_name.format(i=index)}.{leaf}" for their_name in names], is_conv1d and leaf == "weight"


def _with_prefix(name: str, model: Model) -> str:
    if model.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name
