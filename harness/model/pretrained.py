"""Parameters from the files of a `save_pretrained` folder: each rank reads what it holds, and nothing else.

A file is opened for one tensor and closed again: mapped pages would count as this process's memory for as long.
"""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor

from harness.spec.parameters import ParameterSpec
from harness.spec.pretrained import Pretrained, StoredTensor


def read_part(pretrained: Pretrained, spec: ParameterSpec, index: int, start: int, stop: int) -> Tensor:
    """A range of a part of a parameter along the dimension that ranks share, in the type of the file.

    Args:
        index: of the part, among those that are fused along this dimension.
        start, stop: within the part; no meaning where every rank holds the whole.
    """
    stored, transposed = pretrained.parts_of(spec.name)
    tensor = stored[index] if len(stored) > 1 else stored[0]
    if spec.shard_dim is None:
        return read_tensor(tensor)
    before = 0 if len(stored) > 1 else sum(size for _, size in spec.parts[:index])
    wanted = slice(before + start, before + stop)
    is_column = (spec.shard_dim == 1) != transposed
    with safe_open(tensor.file, framework="pt") as file:
        read: Tensor = file.get_slice(tensor.name)[(slice(None), wanted) if is_column else wanted]
    return read.t() if transposed else read


def read_tensor(stored: StoredTensor) -> Tensor:
    """A whole tensor of a file."""
    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored.name)
    return tensor


def read_slice(pretrained: Pretrained, spec: ParameterSpec, tp_rank: int, tp_size: int) -> Tensor:
    """The slice of one rank in fp32, which holds every value of the files; zeros past the end of the vocabulary."""
    if spec.shard_dim is None:
        return read_part(pretrained, spec, 0, 0, 0).float()
    shares = [spec.share(size, tp_size) for _, size in spec.parts]
    shape = [sum(shares) if dim == spec.shard_dim else size for dim, size in enumerate(spec.shape)]
    local, first = torch.zeros(shape), 0
    for index, ((_, size), share) in enumerate(zip(spec.parts, shares, strict=True)):
        start, stop = min(tp_rank * share, size), min((tp_rank + 1) * share, size)
        if start < stop:
            part = read_part(pretrained, spec, index, start, stop)
            local.narrow(spec.shard_dim, first, stop - start).copy_(part)
        first += share
    return local
