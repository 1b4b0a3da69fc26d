"""Every parameter by its global name: its full shape, how it is split over ranks, how it is drawn.

One table serves fresh weights, checkpoints and conversion. A global name is
`<layer name>.<parameter path>`, such as `blocks.3.attention.qkv.weight`, whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from harness.model.dropout import stream_seed
from harness.model.groups import TensorParallel
from harness.spec.config import Model

Parts = tuple[tuple[str, int], ...]
"""Name and size of what is fused along one dimension."""


def has_biases(model: Model) -> bool:
    """Linear layers and norms have biases."""
    return model.family == "gpt2"


def qkv_parts(model: Model) -> Parts:
    """Outputs of the fused attention projection."""
    kv_size = model.num_key_value_heads * model.head_dim
    return (("q", model.num_attention_heads * model.head_dim), ("k", kv_size), ("v", kv_size))


def mlp_parts(model: Model) -> Parts:
    """Outputs of the first feed-forward projection."""
    names = ("gate", "up") if model.family == "llama" else ("up",)
    return tuple((name, model.intermediate_size) for name in names)


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    """Full shape, vocabulary not padded."""
    init: Literal["normal", "residual", "zeros", "ones"]
    """residual: normal, narrower the deeper the model."""
    shard_dim: int | None = None
    """Dimension split over tensor-parallel ranks; None: every rank holds the whole."""
    parts: Parts = ()
    """What is fused along `shard_dim`; each part is split on its own."""
    padded: bool = False
    """`shard_dim` is the vocabulary, padded with zeros to a multiple of the ranks."""


def parameter_table(model: Model) -> dict[str, ParameterSpec]:
    """All parameters by global name, in the order of the layers."""
    vocabulary = (model.vocab_size, model.hidden_size)
    rows: Parts = (("vocabulary", model.vocab_size),)
    specs = [ParameterSpec("embedding.weight", vocabulary, "normal", 0, rows, padded=True)]
    if model.family == "gpt2":
        positions = (model.max_position_embeddings, model.hidden_size)
        specs.append(ParameterSpec("position_embedding.weight", positions, "normal"))
    for index in range(model.num_hidden_layers):
        specs += _block_specs(model, f"blocks.{index}")
    specs += _norm_specs(model, "final_norm")
    if not model.tie_word_embeddings:
        specs.append(ParameterSpec("head.weight", vocabulary, "normal", 0, rows, padded=True))
    return {spec.name: spec for spec in specs}


def _block_specs(model: Model, block: str) -> list[ParameterSpec]:
    if model.family == "emulated":
        return [ParameterSpec(f"{block}.weight", (model.hidden_size,), "normal")]
    attention_size = model.num_attention_heads * model.head_dim
    return [
        *_norm_specs(model, f"{block}.attention_norm"),
        *_column_specs(model, f"{block}.attention.qkv", qkv_parts(model)),
        *_row_specs(model, f"{block}.attention.output", attention_size),
        *_norm_specs(model, f"{block}.mlp_norm"),
        *_column_specs(model, f"{block}.mlp.up", mlp_parts(model)),
        *_row_specs(model, f"{block}.mlp.down", model.intermediate_size),
    ]


def _norm_specs(model: Model, layer: str) -> list[ParameterSpec]:
    weight = ParameterSpec(f"{layer}.weight", (model.hidden_size,), "ones")
    bias = ParameterSpec(f"{layer}.bias", (model.hidden_size,), "zeros")
    return [weight, bias] if has_biases(model) else [weight]


def _column_specs(model: Model, layer: str, parts: Parts) -> list[ParameterSpec]:
    out_features = sum(size for _, size in parts)
    weight = ParameterSpec(f"{layer}.weight", (out_features, model.hidden_size), "normal", 0, parts)
    bias = ParameterSpec(f"{layer}.bias", (out_features,), "zeros", 0, parts)
    return [weight, bias] if has_biases(model) else [weight]


def _row_specs(model: Model, layer: str, in_features: int) -> list[ParameterSpec]:
    parts: Parts = (("input", in_features),)
    weight = ParameterSpec(f"{layer}.weight", (model.hidden_size, in_features), "residual", 1, parts)
    bias = ParameterSpec(f"{layer}.bias", (model.hidden_size,), "zeros")
    return [weight, bias] if has_biases(model) else [weight]


def shard(full: Tensor, spec: ParameterSpec, tp_rank: int, tp_size: int) -> Tensor:
    """The slice of one rank; may be a view of `full`."""
    assert tuple(full.shape) == spec.shape, f"{spec.name}: {tuple(full.shape)} is not {spec.shape}"
    if spec.shard_dim is None or tp_size == 1:
        return full
    parts = torch.split(full, [size for _, size in spec.parts], dim=spec.shard_dim)
    slices = [_slice(part, spec, tp_rank, tp_size) for part in parts]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=spec.shard_dim)


def _slice(part: Tensor, spec: ParameterSpec, tp_rank: int, tp_size: int) -> Tensor:
    """One rank's slice of one part, filled up with zeros past the end of the vocabulary."""
    dim = spec.shard_dim
    assert dim is not None
    size = part.shape[dim]
    share = _share(size, spec, tp_size)
    start, stop = min(tp_rank * share, size), min((tp_rank + 1) * share, size)
    own = part.narrow(dim, start, stop - start)
    missing = share - own.shape[dim]
    if missing == 0:
        return own
    padding = own.new_zeros([missing if d == dim else n for d, n in enumerate(own.shape)])
    return torch.cat((own, padding), dim=dim)


def _share(size: int, spec: ParameterSpec, tp_size: int) -> int:
    """Rows or columns that each rank holds of a part."""
    assert spec.padded or size % tp_size == 0, f"{spec.name}: {size} can't be split over {tp_size} ranks"
    return -(-size // tp_size)


def unshard(slices: Sequence[Tensor], spec: ParameterSpec) -> Tensor:
    """The full parameter from the slices of all ranks in order: the inverse of `shard`."""
    dim, tp_size = spec.shard_dim, len(slices)
    if dim is None or tp_size == 1:
        return slices[0]
    sizes = [size for _, size in spec.parts]
    shares = [_share(size, spec, tp_size) for size in sizes]
    ranks = [torch.split(local, shares, dim=dim) for local in slices]
    parts = [torch.cat([rank[index] for rank in ranks], dim=dim) for index in range(len(sizes))]
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def draw(spec: ParameterSpec, seed: int, model: Model) -> Tensor:
    """Fresh full parameter in fp32 on the CPU, a function of the seed and its name alone.

    Projections onto the residual stream are narrower by sqrt(2 x layers), as in GPT-2 and Megatron-LM.
    """
    if spec.init in ("zeros", "ones"):
        return torch.full(spec.shape, float(spec.init == "ones"), dtype=torch.float32, device="cpu")
    std = model.initializer_range
    if spec.init == "residual":
        std /= math.sqrt(2 * model.num_hidden_layers)
    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, spec.name))
    return torch.empty(spec.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def load_full(
    parameters: Iterable[tuple[str, nn.Parameter]],
    table: Mapping[str, ParameterSpec],
    lookup: Callable[[str], Tensor],
    tp: TensorParallel,
) -> None:
    """Fill this rank's parameters, given with their global names, from full ones.

    Also marks what is sharded with `tensor_model_parallel`, by which DeepSpeed's norms know that
    other ranks hold different values; anything else is counted on one rank.

    Args:
        lookup: full parameter by global name, asked once for each parameter this rank holds.
    """
    with torch.no_grad():
        for name, parameter in parameters:
            spec = table[name]
            local = shard(lookup(name), spec, tp.rank, tp.size)
            assert local.shape == parameter.shape, f"{name}: {local.shape} does not fit {parameter.shape}"
            parameter.copy_(local)
            setattr(parameter, "tensor_model_parallel", spec.shard_dim is not None)  # noqa: B010


def initialize(parameters: Iterable[tuple[str, nn.Parameter]], model: Model, tp: TensorParallel, seed: int) -> None:
    """Fill this rank's parameters, given with their global names, with fresh weights.

    Whole weights are drawn, then sliced, so every layout starts from the same model.
    """
    table = parameter_table(model)
    load_full(parameters, table, lambda name: draw(table[name], seed, model), tp)
