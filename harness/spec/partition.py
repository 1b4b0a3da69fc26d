"""Which layers go to which pipeline stage.

The embedding belongs to the first stage and the head to the last; the transformer blocks between them
are split into contiguous runs, at least one block per stage.
"""

from __future__ import annotations

from harness.spec.config import Model, Parallel
from harness.spec.counts import (
    block_forward_flops,
    block_parameters,
    embedding_parameters,
    head_forward_flops,
    head_parameters,
    tied_parameters,
)


def layers_per_stage(model: Model, parallel: Parallel, sequence_length: int) -> list[int]:
    """Transformer blocks of each stage, by `parallel.partition`.

    Returns:
        pp numbers, each at least 1, whose sum is `model.num_hidden_layers`.
    """
    method = parallel.partition
    if isinstance(method, list):
        return list(method)
    if method == "uniform" or (method == "cost" and not model.architecture.computes):  # all blocks wait as long
        first, block, last = 0, 1, 0
    elif method == "parameters":
        tied = tied_parameters(model) if parallel.pp > 1 else 0
        first, block, last = (
            embedding_parameters(model),
            block_parameters(model),
            head_parameters(model) + tied,
        )
    else:
        first, block, last = 0, block_forward_flops(model, sequence_length), head_forward_flops(model)
    return balance(model.num_hidden_layers, parallel.pp, block, first, last)


def balance(num_layers: int, num_stages: int, block: float, first: float = 0, last: float = 0) -> list[int]:
    """Split equal blocks over stages so that the heaviest stage is as light as can be.

    Blocks are alike, so handing out one at a time to the stage that is lightest with it is optimal.
    Ties go to the earlier stage.

    Args:
        block: weight of one block.
        first: weight that the first stage carries besides (the embedding).
        last: weight that the last stage carries besides (the head).
    """
    stages = [1] * num_stages
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    for _ in range(num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda s: ((stages[s] + 1) * block + extra[s], s))
        stages[lightest] += 1
    return stages
