"""Is this process a rank? A launcher of the harness, or started by the user's own `deepspeed`."""

from __future__ import annotations

import os

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_rank() -> bool:
    """Whether `deepspeed` started this process as one of its ranks."""
    return all(name in os.environ for name in RANK_VARIABLES)
