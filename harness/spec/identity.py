"""What names a point: a hash of everything that its measurement depends on but the machine."""

from __future__ import annotations

import hashlib
import json

from harness.checkpoints import fingerprint
from harness.spec.config import RunConfig


def identity(config: RunConfig, data_fingerprint: str) -> str:
    """Eight hex digits that name what is computed and left behind, wherever and by whomever it is started.

    A run that writes checkpoints is another point than one that writes none: it leaves what the other lacks, and
    writing disturbs its steps.

    Args:
        data_fingerprint: hash of the tokens, so that a moved file stays the same data.
    """
    without_checkpoints = {"checkpoint_interval", "keep_checkpoints"} if config.train.checkpoint_interval == 0 else None
    train = config.train.model_dump(exclude=without_checkpoints)
    if config.train.resume is not None:  # a moved checkpoint stays the same, too
        train["resume"] = fingerprint(config.train.resume)
    content = {
        "model": config.model.model_dump(exclude={"name"}),
        "parallel": config.parallel.model_dump(exclude={"engine"} if config.parallel.engine == "deepspeed" else None),
        "train": train,
        "data": data_fingerprint,
        "deepspeed": config.deepspeed,
        "threads_per_rank": config.launch.threads_per_rank,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
