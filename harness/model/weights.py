"""Parameters by the table of `harness.spec.parameters`: cut into the slices of ranks, put together, drawn, loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.model.context import stream_seed
from harness.model.groups import TensorParallel
from harness.spec.config import Model
from harness.spec.parameters import ParameterSpec, parameter_table


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
    share = spec.share(size, tp_size)
    start, stop = min(tp_rank * share, size), min((tp_rank + 1) * share, size)
    own = part.narrow(dim, start, stop - start)
    missing = share - own.shape[dim]
    if missing == 0:
        return own
    padding = own.new_zeros([missing if d == dim else n for d, n in enumerate(own.shape)])
    return torch.cat((own, padding), dim=dim)


def unshard(slices: Sequence[Tensor], spec: ParameterSpec) -> Tensor:
    """The full parameter from the slices of all ranks in order: the inverse of `shard`."""
    dim, tp_size = spec.shard_dim, len(slices)
    if dim is None or tp_size == 1:
        return slices[0]
    sizes = [size for _, size in spec.parts]
    shares = [spec.share(size, tp_size) for size in sizes]
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


def fill(
    parameters: Iterable[tuple[str, nn.Parameter]],
    table: Mapping[str, ParameterSpec],
    write: Callable[[ParameterSpec, nn.Parameter], object],
) -> None:
    """Fill this rank's parameters, given with their global names, one after the other.

    Also marks what is sharded with `tensor_model_parallel`, by which DeepSpeed's norms know that
    other ranks hold different values; anything else is counted on one rank.

    Args:
        write: puts this rank's slice of a parameter into it.
    """
    with torch.no_grad():
        for name, parameter in parameters:
            write(table[name], parameter)
            setattr(parameter, "tensor_model_parallel", table[name].shard_dim is not None)  # noqa: B010


def load_full(
    parameters: Iterable[tuple[str, nn.Parameter]],
    table: Mapping[str, ParameterSpec],
    lookup: Callable[[str], Tensor],
    tp: TensorParallel,
) -> None:
    """As `fill`, from full parameters.

    Args:
        lookup: full parameter by global name, asked once for each parameter this rank holds.
    """

    def write(spec: ParameterSpec, parameter: nn.Parameter) -> None:
        local = shard(lookup(spec.name), spec, tp.rank, tp.size)
        assert local.shape == parameter.shape, f"{spec.name}: {local.shape} does not fit {parameter.shape}"
        parameter.copy_(local)

    fill(parameters, table, write)


def initialize(parameters: Iterable[tuple[str, nn.Parameter]], model: Model, tp: TensorParallel, seed: int) -> None:
    """Fill this rank's parameters, given with their global names, with fresh weights.

    Whole weights are drawn, then sliced, so every layout starts from the same model.
    """
    table = parameter_table(model)
    load_full(parameters, table, lambda name: draw(table[name], seed, model), tp)
