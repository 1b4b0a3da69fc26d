"""How the layers are cut into the parts of a pipeline (`harness.spec.placement` says which stage has which).

The embedding belongs to the first part and the head to the last; the transformer blocks between them are split into
contiguous runs, at least one block per part. With one chunk per stage, a part is a stage.
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
from harness.spec.placement import Placement
from harness.spec.schedules import placement_of


def layers_per_part(model: Model, parallel: Parallel, sequence_length: int) -> list[int]:
    """Transformer blocks of each part, by `parallel.partition`.

    Returns:
        pp x num_chunks numbers, each at least 1, whose sum is `model.num_hidden_layers`.
    """
    method, placement = parallel.partition, placement_of(parallel)
    if isinstance(method, list):
        return list(method)
    if method == "uniform" or (method == "cost" and not model.architecture.computes):  # all blocks wait as long
        first, block, last = 0, 1, 0
    elif method == "parameters":
        ends = {placement.stage_of(0), placement.stage_of(placement.num_parts - 1)}
        tied = tied_parameters(model) if len(ends) > 1 else 0
        first, block, last = (
            embedding_parameters(model),
            block_parameters(model),
            head_parameters(model) + tied,
        )
    else:
        first, block, last = 0, block_forward_flops(model, sequence_length), head_forward_flops(model)
    return balance(model.num_hidden_layers, placement, block, first, last)


def balance(num_layers: int, placement: Placement, block: float, first: float = 0, last: float = 0) -> list[int]:
    """Split equal blocks over parts so that the heaviest stage is as light as can be, and its parts alike.

    Blocks are alike, so handing out one at a time to the stage that is lightest with it is optimal.
    Ties go to the earlier stage, and inside a stage to the earlier part.

    Args:
        block: weight of one block.
        first: weight that the first part carries besides (the embedding).
        last: weight that the last part carries besides (the head).
    """
    parts = [1] * placement.num_parts
    extra = [0.0] * placement.num_parts
    extra[0] += first
    extra[-1] += last

    def weight(held: list[int]) -> float:
        return sum((parts[part] * block + extra[part] for part in held), block)

    stages = [placement.parts_of(stage) for stage in range(placement.num_stages)]
    for _ in range(num_layers - placement.num_parts):
        lightest = min(stages, key=lambda held: (weight(held), held))
        parts[min(lightest, key=lambda part: (weight([part]), part))] += 1
    return parts
