"""What a rank tells of where it stands in training: a mark as each instruction begins and ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from harness.record.heartbeat import STANDS, Heart


def attach_heartbeat(engine: PipelineEngine, kinds: Mapping[type, str], heart: Heart, device_kind: str) -> None:
    """Let every instruction of an engine leave a mark in the rank's heartbeat when it begins and ends.

    Args:
        kinds: instruction -> its name.
        device_kind: on a GPU an instruction's end says that it is enqueued, not that it is done.
    """
    seen, step = defaultdict[str, int](int), 0
    words = ("enqueuing", "after enqueuing") if device_kind == "cuda" else ("in", "after")
    begun, ended = map(STANDS.index, words)
    mark = heart.mark

    def beating(kind: str, execute: Callable[..., None]) -> Callable[..., None]:
        name = kind.encode()

        def beat(engine: PipelineEngine, **arguments: Any) -> None:
            nonlocal step
            if step != engine.global_steps + 1:
                step = engine.global_steps + 1
                seen.clear()
            now, micro_batch = step, seen[kind]
            seen[kind] = micro_batch + 1
            mark(now, micro_batch, begun, name)
            execute(engine, **arguments)
            mark(now, micro_batch, ended, name)

        return beat

    engine._INSTRUCTION_MAP = {
        instruction: beating(kinds[instruction], execute) if instruction in kinds else execute
        for instruction, execute in engine._INSTRUCTION_MAP.items()
    }
