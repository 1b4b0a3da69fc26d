"""What is left to do once a run has ended: draw its pictures, and mirror it to wandb.

Child processes of low priority do it under time limits, so that a missing, slow or failing library costs a warning and
never a measurement. This module starts them (`begin`) and waits for them (`finish`), and is the one that draws:

    python -m harness.analyse.finish ATTEMPT_DIR

`harness.record.mirror` is the one that writes wandb runs. A sweep begins to finish each run as it ends, and waits
for all of them at its end; whoever runs a single one does both at once (`finish_now`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.record.mirror import KEPT_VARIABLES, outcome_file, wandb_settings
from harness.record.store import Attempt, read_json, read_jsonl, write_json
from harness.spec.config import REPOSITORY, RunConfig

if TYPE_CHECKING:
    from harness.analyse.breakdown import RunSpans

PICTURES_SECONDS = 60.0
MISSING = "pictures.json"
"""What an attempt's pictures lack; absent where they are whole."""


@dataclass(frozen=True)
class Child:
    """A process that works on directories of attempts, or of a sweep."""

    process: subprocess.Popen[bytes]
    paths: Sequence[Path]


@dataclass(frozen=True)
class Finishing:
    """The children that finish a run; None where there is nothing to do, or it can't start."""

    mirror: Child | None = None
    pictures: Child | None = None


def follow(attempt: Attempt, config: RunConfig) -> Child | None:
    """With `tracking.live`, begin to mirror a run that is about to start; it is followed until its status changes."""
    if not config.tracking.live:
        return None
    attempt.write_status("running")
    return start_mirror(attempt)


def begin(attempt: Attempt, following: Child | None = None) -> Finishing:
    """Begin to finish a run that has ended.

    Args:
        following: what `follow` returned.
    """
    return Finishing(following or start_mirror(attempt), start_pictures(attempt))


def finish(begun: Iterable[Finishing], wandb_seconds: float) -> list[str]:
    """Wait for children, and end those that are late.

    Args:
        wandb_seconds: for all mirrors together; pictures have PICTURES_SECONDS for each run.

    Returns:
        A line for each child that did not do everything.
    """
    begun = list(begun)
    deadline = time.monotonic() + wandb_seconds
    warnings = [
        warning
        for child in (finishing.mirror for finishing in begun)
        if child and (warning := _wait_for_mirror(child, deadline, wandb_seconds))
    ]
    return warnings + [
        warning
        for child in (finishing.pictures for finishing in begun)
        if child and (warning := _wait_for_pictures(child))
    ]


def replay(paths: Sequence[Path]) -> Finishing:
    """Begin to mirror attempts that wandb lacks, or a sweep's table."""
    return Finishing(_start_mirrors(paths))


def finish_now(attempt: Attempt, following: Child | None = None) -> None:
    """Finish a single run that has ended, and print what is missing."""
    print_warnings(finish([begin(attempt, following)], attempt.config().tracking.wandb.timeout_seconds))


def print_warnings(warnings: Iterable[str]) -> None:
    """Print a line for each to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def start_mirror(attempt: Attempt) -> Child | None:
    """Mirror an attempt in a child process; None when `tracking.wandb.mode` is `disabled`.

    Started while the attempt's status is `running`, it follows metrics.jsonl until the status changes.
    """
    return None if wandb_settings(attempt.raw_config()).mode == "disabled" else _start_mirrors([attempt.path])


def _start_mirrors(paths: Sequence[Path]) -> Child | None:
    """Mirror attempt and sweep directories, one after the other, in one child process; None when it can't start."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {key: value for key, value in os.environ.items() if key in KEPT_VARIABLES}
    return _start("harness.record.mirror", paths, environment | {"WANDB_SILENT": "true"}, "wandb is not written")


def start_pictures(attempt: Attempt) -> Child | None:
    """`write_pictures` in a child process that leaves the processor to others.

    None when no step was done, so that there is nothing to draw and to miss, or it can't start.
    """
    if not read_jsonl(attempt.metrics_file):
        return None
    return _start(__name__, [attempt.path], os.environ, "pictures are not drawn")


def _start(module: str, paths: Sequence[Path], environment: Mapping[str, str], problem: str) -> Child | None:
    """Run a module on directories, in a session of its own: what stops us does not stop it."""
    command = [sys.executable, "-m", module, *(str(path.resolve()) for path in paths)]
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
        )
    except OSError as error:
        logging.getLogger(__name__).warning("%s: %s", problem, error)
        return None
    return Child(process, paths)


def _succeeded(child: Child, seconds: float) -> bool | None:
    """Whether a child did its work; None for one that was late, and was ended with its children."""
    try:
        return child.process.wait(max(0.0, seconds)) == 0
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        return None


def _wait_for_mirror(child: Child, deadline: float, limit_seconds: float) -> str | None:
    """What it did not do, in a sentence."""
    succeeded = _succeeded(child, deadline - time.monotonic())
    if succeeded:
        return None
    reason = "the process that writes it crashed" if succeeded is False else f"not done in {limit_seconds:g} s"
    errors = [(read_json(outcome_file(path)) or {}).get("error") for path in child.paths]
    reason = next(filter(None, errors), reason)
    return f"wandb is not complete ({reason}); report.py --wandb writes what it lacks"


def _wait_for_pictures(child: Child) -> str | None:
    """What they lack, in a sentence."""
    succeeded = _succeeded(child, PICTURES_SECONDS)
    (path,) = child.paths
    if succeeded is None:
        missing = [f"no pictures within {PICTURES_SECONDS:g} s"]
    else:
        missing = (read_json(path / MISSING) or {}).get("missing", [] if succeeded else ["no pictures"])
    return f"{path.parent.name}/{path.name}: {'; '.join(missing)}" if missing else None


def write_pictures(attempt: Attempt) -> list[str]:
    """Write accounting.png (of training) and timeline.png, and trace.json if `tracking.trace_steps` asks for it.

    Returns:
        What is missing, in sentences.
    """
    from harness.analyse.breakdown import read_run
    from harness.analyse.rings import ring_orders, without_hearing
    from harness.spans.perfetto import chrome_trace

    config = attempt.config()
    run = read_run(attempt, config)
    losses, is_training = list(run.losses), config.task == "train"
    if run.timed_steps:
        (_draw_training if is_training else _draw_inference)(attempt, run)
    there = set[int]().union(*({span.step for span in file.spans} for file in run.files))
    steps = there.intersection(config.tracking.trace_steps)
    losses += [f"step {step} left no spans" for step in sorted(set(config.tracking.trace_steps) - there)]
    if steps:
        there_are = [file if is_training else without_hearing(file) for file in run.files if file.header]
        orders = run.schedule.stages if is_training else ring_orders(run.lines()[0])
        write_json(attempt.path / "trace.json", chrome_trace(there_are, run.topology.pipelines(), orders, steps))
    return losses


def _draw_training(attempt: Attempt, run: RunSpans) -> None:
    from harness.analyse.breakdown import breakdown
    from harness.record.plots import accounting_picture, timeline_picture

    config, step = run.config, _typical_step(run)
    title = f"{config.model.name}  {config.slug}  {config.parallel.schedule}  m={config.num_micro_batches}"
    accounting_picture(breakdown(run)["accounting"], attempt.path / "accounting.png", title)
    shown = {rank: file.instructions(step) for rank, file in enumerate(run.files) if file.header["dp"] == 0}
    timeline_picture({"": shown}, attempt.path / "timeline.png", f"{title}  step {step}")


def _draw_inference(attempt: Attempt, run: RunSpans) -> None:
    from harness.analyse.rings import first_passes
    from harness.record.columns import layout_columns
    from harness.record.plots import timeline_picture

    config, step = run.config, _typical_step(run)
    title = f"{config.model.name}  tp{config.parallel.tp} pp{config.parallel.pp}  "
    if config.task == "generate":
        title += (
            f"batch {config.generate.batch_size}  groups {layout_columns(config)['num_groups']}  measurement {step}"
        )
    else:
        title += f"m={config.num_micro_batches}  step {step}"
    if panels := first_passes(run.files, step):
        timeline_picture(panels, attempt.path / "timeline.png", title)


def _typical_step(run: RunSpans) -> int:
    """The timed step of median duration."""
    seconds = run.files[0].step_seconds()
    return sorted(run.timed_steps, key=seconds.__getitem__)[len(run.timed_steps) // 2]


def main(arguments: Sequence[str]) -> int:
    """Draw the pictures of attempts, print what they lack and leave it beside them; the exit status."""
    os.nice(19)
    failed = False
    for attempt in map(Attempt, map(Path, arguments)):
        try:
            missing = write_pictures(attempt)
        except Exception as error:
            failed, missing = True, [f"no pictures ({type(error).__name__}: {' '.join(str(error).split())})"]
        (attempt.path / MISSING).unlink(missing_ok=True)
        if missing:
            print(f"{attempt.path}: {'; '.join(missing)}")
            write_json(attempt.path / MISSING, {"missing": missing})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
