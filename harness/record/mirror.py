"""The wandb mirror: a run directory as one wandb run, a sweep as another with the table of its rows.

It runs in a child process of low priority, which `harness.analyse.finish` starts and gives a time limit:

    python -m harness.record.mirror ATTEMPT_DIR_OR_SWEEP_DIR ...

The run directory stays the truth. A mirror that got lost is written again from it by `report.py --wandb`; it
replaces what an earlier try left, so there is one wandb run per attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.record.store import Attempt, SweepDirectory, write_json
from harness.spec.config import Wandb
from harness.strict_json import with_numbers

# What a child keeps of the WANDB_* variables: how to reach the server and as whom. The others name a run, and
# would make ours a part of the one that some parent process has open.
KEPT_VARIABLES = frozenset(
    f"WANDB_{name}"
    for name in """API_KEY BASE_URL APP_URL ENTITY USERNAME USER_EMAIL IDENTITY_TOKEN_FILE CREDENTIALS_FILE
    CONFIG_DIR CACHE_DIR DATA_DIR HTTP_TIMEOUT INSECURE_DISABLE_SSL""".split()
)
DEFAULTS = Wandb(mode="offline", project="shardwright", entity=None, timeout_seconds=60.0)


def mirror(attempt: Attempt) -> None:
    """Write the wandb run of an attempt: configuration, history, and the columns of results.csv as its summary."""
    from harness.record.rows import row  # numpy, which whoever only starts a mirror does without

    raw, status, columns = attempt.raw_config(), attempt.status(), row(attempt)
    # The same on every replay, and another one for the same point of another sweep or machine.
    digest = _digest(attempt.sweep.name, status.get("host"), status.get("started"))
    tags = (("tp", "tp"), ("pp", "pp"), ("mbs", "micro_batch_size"))
    topology = {key: columns[key] for key in ("tp", "pp", "dp", "world_size", "num_micro_batches")}
    with _open_run(
        attempt.sweep,
        wandb_settings(raw),
        id=f"{attempt.point.name}-{attempt.path.name}-{digest}",
        name=f"{attempt.point.name}/{attempt.path.name}",
        job_type="point",
        tags=[f"{short}{columns[key]}" for short, key in tags if columns[key] is not None],
        config=raw,
    ) as run:
        run.define_metric("step", summary="none")
        run.define_metric("*", step_metric="step", summary="none")
        for line in _follow(attempt):
            run.log(line)
        status, columns = attempt.status(), row(attempt) | {"wandb_run_id": run.id}
        run.config.update({"topology": topology, **(status.get("environment") or {})})
        run.tags += (columns["status"],)
        run.summary.update(columns)
        run.finish(exit_code=int(columns["status"] != "ok"))
    write_json(outcome_file(attempt.path), {"run_id": run.id})


def mirror_sweep(sweep: SweepDirectory) -> None:
    """Write the wandb run of a sweep: its request, and results.csv as a table.

    Raises:
        OSError: there is no results.csv.
    """
    import pandas
    import wandb

    frame = pandas.read_csv(sweep.path / "results.csv")
    frame = frame.astype(object).where(frame.notna(), None)
    attempts = [attempt for point in sweep.points() for attempt in point.attempts()]
    with _open_run(
        sweep,
        wandb_settings(attempts[-1].raw_config() if attempts else {}),
        id=f"sweep-{sweep.name}-{_digest(platform.node(), sweep.path.resolve())}",
        name=sweep.name,
        job_type="sweep",
        config=sweep.request(),
    ) as run:
        run.log({"results": wandb.Table(columns=list(frame.columns), data=frame.to_numpy().tolist())})
        run.summary.update({f"points/{status}": int(count) for status, count in frame["status"].value_counts().items()})
    write_json(outcome_file(sweep.path), {"run_id": run.id})


def _open_run(sweep: SweepDirectory, settings: Wandb, *, id: str, **content: Any) -> Any:
    """A wandb run that replaces what an earlier try with its id left behind.

    Args:
        content: further arguments of `wandb.init`.
    """
    import wandb

    for leftover in (sweep.path / "wandb").glob(f"offline-run-*-{id}"):
        shutil.rmtree(leftover)
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode="online" if settings.mode == "online" else "offline",
        dir=sweep.path,
        id=id,
        group=sweep.name,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=settings.timeout_seconds,
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
        **content,
    )


def _follow(attempt: Attempt) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl, as they come until the attempt, or the process that started us, ends."""
    parent, position = os.getppid(), 0
    while True:
        ended = attempt.status()["status"] not in ("pending", "running") or os.getppid() != parent
        try:
            with attempt.metrics_file.open("rb") as file:
                file.seek(position)
                content = file.read()
        except FileNotFoundError:
            content = b""
        whole = content[: content.rfind(b"\n") + 1]
        position += len(whole)
        for line in whole.splitlines():
            try:
                yield with_numbers(json.loads(line))
            except ValueError:
                return
        if ended:
            return
        time.sleep(1)


def wandb_settings(raw: Mapping[str, Any]) -> Wandb:
    """`tracking.wandb` of a configuration; of one that is not valid, the defaults."""
    try:
        return Wandb.model_validate(raw["tracking"]["wandb"])
    except (KeyError, TypeError, ValidationError):
        return DEFAULTS


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:6]


def outcome_file(path: Path) -> Path:
    """Where a mirrored directory keeps its run's id, or why there is none."""
    return path / "wandb" / "sweep.json" if (path / "points").is_dir() else Attempt(path).wandb_file


def main(arguments: Sequence[str]) -> int:
    """Mirror run directories; the exit status. Errors are left in their wandb.json."""
    os.nice(10)
    failed = False
    for path in map(Path, arguments):
        try:
            if (path / "points").is_dir():
                mirror_sweep(SweepDirectory(path.parent, path.name))
            else:
                mirror(Attempt(path))
        except Exception as error:
            failed = True
            with contextlib.suppress(OSError):
                write_json(outcome_file(path), {"error": " ".join(f"{type(error).__name__}: {error}".split())})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
