"""The line that says on what, with what and when a benchmark measured."""

from __future__ import annotations

from datetime import UTC, datetime


def print_circumstances() -> None:
    """Date, device, versions, and the hash of the code, as rows of a sweep carry it."""
    from harness.machine import detect_machine
    from harness.record.store import environment

    machine = detect_machine()
    now = environment(machine)
    versions = ", ".join(f"{name} {now['versions'][name]}" for name in ("python", "torch", "deepspeed"))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {machine.device_name}, {machine.num_cores} cores, {versions}, "
        f"code {now['code']}\n"
    )
