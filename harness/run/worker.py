"""What one rank does: build, train, measure, and write down the result.

Started by the harness as `deepspeed ... --module harness.run.worker ATTEMPT_DIR [TASK]`, or through
`main_started_by_user` when the user starts `deepspeed launchers/train.py` himself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

from harness.errors import ConfigError
from harness.machine import detect_machine
from harness.record.store import OUT_OF_MEMORY, Attempt, write_json
from harness.secrets import hide, variables

TASKS = {"train": "harness.run.train", "verify": "harness.run.verify", "comm_bench": "harness.run.comm_bench"}
"""Task -> module with a function of the task's name: (attempt, config, rank) -> None."""


def main(argv: list[str]) -> None:
    """Run this rank on a prepared attempt."""
    task = argv[1] if len(argv) > 1 else "train"
    _finish(_run_and_report(Attempt(Path(argv[0])), task))


def main_started_by_user(prepare: Callable[[], Path]) -> None:
    """Run this rank when nobody prepared the attempt: rank 0 does, and tells the others.

    Args:
        prepare: composes and checks the configuration and makes the attempt's directory.
    """
    rank = int(os.environ["RANK"])
    path = None
    if rank == 0:
        try:  # before the imports that take seconds, so that a mistake is answered at once
            path = prepare()
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)  # the launcher ends the other ranks
    import torch.distributed as dist

    initialize_distributed()
    shared = [str(path)]
    dist.broadcast_object_list(shared, src=0)
    attempt = Attempt(Path(shared[0]))
    with _copy_of_output(attempt.log_file) if rank == 0 else contextlib.nullcontext():
        status = _run_and_report(attempt)
        if rank == 0:
            attempt.write_status("ok" if status == 0 else "crashed", None if status == 0 else "see errors/ and log.txt")
            _draw_and_mirror(attempt)
    _finish(status)


def initialize_distributed() -> None:
    """Join the other ranks, over NCCL on GPUs and gloo on CPU."""
    kind = detect_machine().device_kind
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile its shared-memory collectives here, half a minute at the first start. They reduce
    # over all ranks whatever group is named, so nothing in the harness calls them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if kind == "cuda" else "gloo"
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    gc.freeze()  # DeepSpeed collects garbage while it builds an engine: each time 0.3 s over all that was imported


def _run_and_report(attempt: Attempt, task: str = "train") -> int:
    """Exit status of the rank; a failure is written to errors/ for whoever judges the run."""
    rank = int(os.environ["RANK"])
    try:
        initialize_distributed()
        config = attempt.config()
        keep_secrets(variables(config.deepspeed))
        run = getattr(importlib.import_module(TASKS[task]), task)
        run(attempt, config, rank)
    except BaseException as error:
        secrets = variables(attempt.raw_config())
        attempt.error_file(rank).parent.mkdir(exist_ok=True)
        write_json(attempt.error_file(rank), hide(describe_error(rank, error), secrets))
        print(hide(traceback.format_exc(), secrets), file=sys.stderr)
        return 1
    return 0


def keep_secrets(names: Collection[str]) -> None:
    """Keep DeepSpeed, which may print its configuration, from printing the values of environment variables."""

    def hide_them(record: logging.LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage(), names), ()
        return True

    if names:
        logging.getLogger("DeepSpeed").addFilter(hide_them)


def _peak_memory_bytes() -> int:
    """Largest memory so far, as far as this rank has got."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_error(rank: int, error: BaseException) -> dict[str, Any]:
    """What a rank leaves behind when it fails."""
    text = str(error)
    return {
        "rank": rank,
        "type": type(error).__name__,
        "message": text,
        "oom": isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__} {text}") is not None,
        "peak_memory_bytes": _peak_memory_bytes(),
        "time": time.time(),
        "traceback": traceback.format_exc(),
    }


def _finish(status: int) -> None:
    """End at once: the result is on disk, and an orderly interpreter shutdown takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _copy_of_output(path: Path) -> Any:
    """Keep what this rank prints in log.txt too."""
    with (
        path.open("a") as log,
        contextlib.redirect_stdout(_Tee(sys.stdout, log)),
        contextlib.redirect_stderr(_Tee(sys.stderr, log)),
    ):
        yield


class _Tee:
    """A text stream that writes to two."""

    def __init__(self, first: IO[str], second: IO[str]) -> None:
        self._streams = (first, second)

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return self._streams[0].isatty()


def _draw_and_mirror(attempt: Attempt) -> None:
    """Draw the finished run's pictures and write it to wandb, from child processes under time limits."""
    from harness.breakdown import finish_pictures, start_pictures
    from harness.record.tracking import finish_mirrors, start_mirror

    pictures = start_pictures(attempt)
    timeout = attempt.config().tracking.wandb.timeout_seconds
    for warning in finish_mirrors([start_mirror(attempt)], timeout):
        print(f"warning: {warning}", file=sys.stderr)
    finish_pictures([pictures])


if __name__ == "__main__":
    main(sys.argv[1:])
