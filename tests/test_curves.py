"""The loss curve on real text is the same in every layout of the default grid.

Plain SGD without clipping shows a wrong gradient: layouts agree to some 1e-7, a part in a thousand too much in the
gradient of the embeddings moves the curve by 1.5e-4, in another's by 2e-6 at most; for those there is the parity check.
AdamW hides a factor and amplifies rounding.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from distributed import run_ranks

SGD = [
    "model.hidden_size=64",
    "train.steps=15",
    "train.sequence_length=32",
    "train.optimizer=sgd",
    "train.learning_rate=0.03",
    "train.learning_rate_warmup_steps=0",
    "train.learning_rate_decay=constant",
    "train.gradient_clipping=0",
]
GRID = list(product((1, 2), (1, 2), (1, 2, 4)))


@pytest.mark.slow
def test_sgd_curves_of_all_layouts_agree(tmp_path: Path) -> None:
    curves: dict[tuple[int, int, int], list[float]] = {}
    for world_size in (1, 2, 4):
        points = [point for point in GRID if point[0] * point[1] == world_size]
        cases = [
            [*SGD, f"parallel.tp={tp}", f"parallel.pp={pp}", f"train.micro_batch_size={size}"]
            for tp, pp, size in points
        ]
        folder = tmp_path / str(world_size)
        folder.mkdir()
        curves |= dict(zip(points, run_ranks(world_size, "ranks_curves", cases, folder), strict=True))
    reference = curves[1, 1, 1]
    assert len(curves) == len(GRID)
    assert sum(reference[-5:]) < sum(reference[:5])
    for point, curve in curves.items():
        assert curve == pytest.approx(reference, rel=1e-6), point
