"""launchers/verify.py: does a layout compute what one rank does, in training, generation or forward passes?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.launch import attempts
from harness.launch.points import Run
from harness.launch.single import run_single
from harness.machine import Machine
from harness.record.diagnose import exit_status
from harness.record.store import Attempt, Point, SweepDirectory, write_atomically, write_json
from harness.spec.config import Generate, RunConfig
from harness.spec.identity import identity
from harness.spec.twin import twin_of

VERIFIED = "verify"
"""Folder of parity checks under results_dir."""


def main(argv: Sequence[str]) -> int:
    """Check one layout; 0 when it passes, 1 when it does not or the check failed, 2 when it can't run."""

    def verify(attempt: Attempt, config: RunConfig, machine: Machine) -> int:
        write_atomically(attempt.command_file, shlex.join(["python", "launchers/verify.py", *argv]) + "\n")
        status = exit_status(attempt, attempts.run_attempt(attempt, config, machine, echo=True, task="verify"))
        if status != 0:
            return status
        parity = (attempt.result() or {})["parity"]
        print(f"parity: {parity}")
        return 0 if parity == "pass" else 1

    return run_single(argv, VERIFIED, verify)


def verify_layouts(
    runs: Sequence[Run],
    sweep: SweepDirectory,
    machine: Machine,
    now: Mapping[str, Any],
    say: Callable[[str], None],
) -> bool:
    """With `sweep.verify`, check each distinct layout of a sweep once, and leave the verdict with its attempts.

    Layouts are distinct when their twins are. A verdict of the same environment is reused.

    Returns:
        Whether a signal stopped it.
    """
    layouts: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.sweep.verify:
            layouts.setdefault(_layout_key(run.config), []).append(run)
    for number, (key, same) in enumerate(layouts.items(), start=1):
        check = _checked(Point(sweep.path / "parity" / f"{same[0].config.slug}_{key}"), same[0], machine, now)
        status = check.status()
        if status["status"] == "interrupted":
            return True
        verdict = _verdict(check.result() if status["status"] == "ok" else None, str(status.get("reason")))
        say(f"parity [{number}/{len(layouts)}] {same[0].config.slug}: {verdict['reason'] or 'pass'}")
        for run in same:
            write_json(run.attempt.parity_file, verdict)
    return False


def _layout_key(config: RunConfig) -> str:
    """Names the computation of a layout's twin: what only says how long, on what or from where it runs, left out."""
    twin = twin_of(config)
    generate = Generate()
    if config.task == "generate":
        changes = {"seed": 0, "repeats": 1, "prompt_length": 1, "max_new_tokens": 1, "perplexity_samples": 0}
        generate = twin.generate.model_copy(update=changes)
    alike = {"seed": 0, "steps": 1, "warmup_steps": 0, "eval_interval": 0, "eval_samples": 1, "resume": None,
             "checkpoint_interval": 0}  # fmt: skip
    train = twin.train.model_copy(update=alike)
    return identity(twin.model_copy(update={"train": train, "generate": generate}), "no data")


def _checked(point: Point, run: Run, machine: Machine, now: Mapping[str, Any]) -> Attempt:
    """The parity check of a point, made unless there is one."""
    if checked := point.measured_in(now):
        return checked[-1]
    attempt = point.new_attempt()
    attempt.write_config(run.config)
    *_, arguments = re.split(r"launchers/\w+\.py", run.attempt.command(), maxsplit=1)
    write_atomically(attempt.command_file, f"python launchers/verify.py{arguments}\n")
    attempts.run_attempt(attempt, run.config, machine, echo=False, task="verify")
    return attempt


def _verdict(result: Mapping[str, Any] | None, failure: str) -> dict[str, Any]:
    """Columns of a point from its parity check; `unknown` where the check itself failed."""
    if result is None:
        unfinished = f"the parity check did not finish: {failure}"
        return {"parity": "unknown", "parity_max_error": None, "reason": unfinished}
    wrong = [found for found in result["comparisons"] if not found["passed"]]
    worst = max(wrong, key=lambda found: found["error"] / found["tolerance"], default=None)
    reason = worst and (
        f"fails the parity check: {worst['kind']} of {worst['worst']} is off by {worst['error']:.1e}, "
        f"allowed {worst['tolerance']:.0e}"
    )
    return {"parity": result["parity"], "parity_max_error": result["parity_max_error"], "reason": reason}
