"""The parity check of one layout, as one rank runs it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harness.machine import detect_machine
from harness.model.products import IS_ONEDNN_FASTER
from harness.record.heartbeat import Heart
from harness.record.store import Attempt, write_json
from harness.run.inference_parity import check_inference
from harness.run.parity import Comparison, check_parity, worst_error
from harness.spec.config import RunConfig
from harness.spec.twin import reductions, twin_of


def verify(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Compare what the small twin of a run computes with one rank, and write what came of it to result.json."""
    twin = twin_of(config)
    changes = changes_on(detect_machine().device_kind, config)
    twin = twin.model_copy(update={"model": twin.model.model_copy(update=changes)})
    phase = Heart(attempt.path, rank).phase
    check = check_parity if config.task == "train" else check_inference
    comparisons = check(twin, rank, phase)
    phase("writing the result")
    if rank != 0:
        return
    passed = all(comparison.passed for comparison in comparisons)
    result: dict[str, Any] = {
        "parity": "pass" if passed else "fail",
        "parity_max_error": worst_error(comparisons),
        "comparisons": [{**asdict(comparison), "passed": comparison.passed} for comparison in comparisons],
        "reduced": reductions(config, twin),
    }
    _print(config, comparisons, result["reduced"])
    write_json(attempt.result_file, result)


def changes_on(device_kind: str, config: RunConfig) -> dict[str, Any]:
    """What the device changes in a twin's model, beyond its sizes."""
    if device_kind == "cuda":  # a seed gives other masks there than on the reference's CPU
        return {"dropout": 0.0}
    takes_onednn = IS_ONEDNN_FASTER and config.model.onednn is None and config.parallel.engine != "dtensor"
    # By themselves, products of the real model go through oneDNN, and those of a twin are too small to.
    return {"onednn": True} if takes_onednn and config.train.precision == "fp32" else {}


def _print(config: RunConfig, comparisons: list[Comparison], reduced: dict[str, tuple[object, object]]) -> None:
    """The worst parameter of each kind, and what the twin left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.model.name} {config.slug} {config.train.precision} against one rank in float64")
    table.add_column("compared")
    table.add_column("worst")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for comparison in comparisons:
        verdict = "ok" if comparison.passed else "[bold red]FAIL[/]"
        table.add_row(
            comparison.kind, comparison.worst, f"{comparison.error:.1e}", f"{comparison.tolerance:.0e}", verdict
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    if reduced:
        changes = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in reduced.items())
        console.print(f"Checked on a small twin of the model: {changes}.", highlight=False)
