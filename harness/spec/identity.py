"""What names a point: a hash of everything that its measurement depends on but the machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from harness.checkpoints import fingerprint
from harness.spec.config import RunConfig
from harness.spec.initial_weights import weights_fingerprint

NOT_COMPUTED = ("data", "cluster", "tracking", "launch", "sweep", "comm_bench", "results_dir")
"""Sections and keys that say where, how and for whom; of data its content counts, of launch the threads."""


def identity(config: RunConfig, data_fingerprint: str) -> str:
    """Eight hex digits that name what is computed and left behind, wherever and by whomever it is started.

    A run that writes checkpoints is another point than one that writes none: it leaves what the other lacks, and
    writing disturbs its steps.

    Keys that have a default in the schema came later than the first points (`harness.spec.versions`), and are left
    out while they have it: then a point is the one it was before. Sections that come later are in it, unless they are
    named here.

    Args:
        data_fingerprint: hash of the tokens, so that a moved file stays the same data.
    """
    excluded: dict[str, Any] = dict.fromkeys(NOT_COMPUTED, True) | {"model": {"name"}}
    if config.train.checkpoint_interval == 0:
        excluded["train"] = {"checkpoint_interval", "keep_checkpoints"}
    # Of prompts their tokens count, like the tokens of data.
    excluded["generate"] = True if config.task == "train" else {"prompt", "prompts_file", "output"}
    content = config.model_dump(exclude=excluded, exclude_defaults=True)
    content |= {"data": data_fingerprint, "threads_per_rank": config.launch.threads_per_rank}
    if config.parallel.schedule_passes is not None:  # and the file of a schedule may have another name
        content["parallel"].pop("schedule")
    if config.train.resume is not None:  # a moved checkpoint stays the same, too
        content["train"]["resume"] = fingerprint(config.train.resume)
    if config.model.weights is not None:  # likewise
        content["model"]["weights"] = weights_fingerprint(config.model.weights)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
