"""What a rank tells of where it stands: two stores into a mapped file per instruction, about a microsecond."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from harness.record.heartbeat import RECORD, heartbeat_file


def attach_heartbeat(engine: PipelineEngine, kinds: Mapping[type, str], attempt: Path, rank: int) -> None:
    """Let every instruction of an engine leave a mark in the rank's heartbeat file when it begins and ends.

    Args:
        kinds: instruction -> its name.
        attempt: folder of the attempt.
    """
    path = heartbeat_file(attempt, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(RECORD.size))  # on disk before it is mapped: a full disk is an error here, not a signal
    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), RECORD.size)
    pack, seen, count, step = RECORD.pack_into, defaultdict[str, int](int), 0, 0

    def beating(kind: str, execute: Callable[..., None]) -> Callable[..., None]:
        name = kind.encode()

        def beat(engine: PipelineEngine, **arguments: Any) -> None:
            nonlocal count, step
            if step != engine.global_steps + 1:
                step = engine.global_steps + 1
                seen.clear()
            now, micro_batch = step, seen[kind]
            seen[kind] = micro_batch + 1
            count += 2
            pack(view, 0, count, now, micro_batch, 0, name)
            execute(engine, **arguments)
            pack(view, 0, count + 1, now, micro_batch, 1, name)

        return beat

    engine._INSTRUCTION_MAP = {
        instruction: beating(kinds[instruction], execute) if instruction in kinds else execute
        for instruction, execute in engine._INSTRUCTION_MAP.items()
    }
