"""Run directories: what a sweep, its points and their attempts leave on disk.

    <results_dir>/<sweep.name>/                        SweepDirectory
        sweep.yaml  results.csv  results.md  wandb/  running.json (whose it is)
        parity/tp2_pp2_dp1_mbs4_9f8e7d6c/attempt-1/    a parity check, with sweep.verify
        points/tp2_pp2_dp1_mbs4_1a2b3c4d/              Point
            attempt-1/                                 Attempt
                config.yaml  ds_config.json  command.txt  status.json  metrics.jsonl
                spans/rank00000.jsonl  result.json  log.txt  errors/rank00000.json  heartbeat/rank00000
                parity.json

State is these files and nothing else. A file that is replaced is replaced as a whole, so a reader sees the
old or the new one; a damaged file reads as absent, and the attempt as one that did not finish.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from harness.errors import ConfigError
from harness.machine import Machine, gpu_versions, process_started
from harness.spec.config import REPOSITORY, RunConfig
from harness.spec.versions import of_a_later_version
from harness.strict_json import dumps, with_numbers

Status = Literal["pending", "running", "interrupted", "ok", "invalid", "oom", "timeout", "hang", "crashed"]

OUT_OF_MEMORY = re.compile(
    r"OutOfMemory|MemoryError|out of memory|can(no|')t allocate memory|bad_alloc|not enough memory", re.IGNORECASE
)
"""What torch, C++ and the kernel say."""

UNFINISHED: frozenset[str] = frozenset({"pending", "running", "interrupted"})

PACKAGES = {"torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "hydra": "hydra-core",
            "numpy": "numpy"}  # fmt: skip

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML has it

# What makes measurements comparable; another host with the same hardware does not matter.
HARDWARE_KEYS = ("device_kind", "device_name", "num_devices", "num_cores")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old or the new content, never a part.

    Raises:
        OSError: the content could not be written; the old file stays and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room there, or set results_dir to another disk" if is_full else ""
        raise OSError(error.errno, f"{error.strerror}{remedy}", str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_atomically(path, dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON object file; None when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_measured(path: Path) -> dict[str, Any] | None:
    """As `read_json`, of a file that may hold NaN and infinities."""
    content: dict[str, Any] | None = with_numbers(read_json(path))
    return content


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a YAML file as a whole; numbers are written so that PyYAML, YAML 1.2 and Hydra read them alike."""
    write_atomically(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Content of a YAML mapping file; None when it is missing or damaged."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file up to the first damaged line; a killed run cuts its last one off."""
    lines = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not isinstance(value := with_numbers(json.loads(line)), dict):
                    break
                lines.append(value)
    except (OSError, ValueError):
        pass
    return lines


def code_hash() -> str:
    """Twelve hex digits over harness/**/*.py: which code measured."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "harness").rglob("*.py")):
        digest.update(f"{path.relative_to(REPOSITORY).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def environment(machine: Machine) -> dict[str, Any]:
    """What a measurement depends on besides its configuration: `versions`, `hardware` and `code`."""
    versions = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            versions[name] = "absent"
    versions |= gpu_versions(machine)
    return {"versions": versions, "hardware": machine.describe(), "code": code_hash()}


def is_stale(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two environments differ in versions, kind of hardware or code."""

    def essence(of: Mapping[str, Any]) -> Any:
        hardware = of.get("hardware") or {}
        return of.get("versions"), of.get("code"), [hardware.get(key) for key in HARDWARE_KEYS]

    return bool(essence(then) != essence(now))


@dataclass(frozen=True)
class Attempt:
    """One try at one point."""

    path: Path

    @property
    def number(self) -> int:
        """Counted from 1."""
        return int(self.path.name.removeprefix("attempt-"))

    @property
    def point(self) -> Point:
        """The point it belongs to."""
        return Point(self.path.parent)

    @property
    def sweep(self) -> SweepDirectory:
        """The sweep it belongs to."""
        folder = self.path.parents[2]
        return SweepDirectory(folder.parent, folder.name)

    @property
    def config_file(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.yaml"

    @property
    def ds_config_file(self) -> Path:
        """Configuration handed to DeepSpeed."""
        return self.path / "ds_config.json"

    @property
    def command_file(self) -> Path:
        """Command that repeats the point."""
        return self.path / "command.txt"

    @property
    def status_file(self) -> Path:
        """Status, reason, times and environment."""
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        """A line per step."""
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        """What was measured; written whole or not at all."""
        return self.path / "result.json"

    @property
    def partial_result_file(self) -> Path:
        """result.json as far as it was known after the last step; gone once there is the whole."""
        return self.path / "result.partial.json"

    @property
    def log_file(self) -> Path:
        """Everything the ranks printed."""
        return self.path / "log.txt"

    @property
    def wandb_file(self) -> Path:
        """What became of its mirror."""
        return self.path / "wandb.json"

    @property
    def generated_file(self) -> Path:
        """A line per sequence that was generated, in the order they ended."""
        return self.path / "generated.jsonl"

    @property
    def stream_file(self) -> Path:
        """Text of the only sequence, as it comes."""
        return self.path / "stream.txt"

    @property
    def parity_file(self) -> Path:
        """What the parity check of its layout found."""
        return self.path / "parity.json"

    def spans_file(self, rank: int) -> Path:
        """Instructions of a rank."""
        return self.path / "spans" / f"rank{rank:05d}.jsonl"

    def error_file(self, rank: int) -> Path:
        """The exception that ended a rank."""
        return self.path / "errors" / f"rank{rank:05d}.json"

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml."""
        write_yaml(self.config_file, config.model_dump(mode="json"))

    def raw_config(self) -> dict[str, Any]:
        """config.yaml as plain containers, for a refused point too; empty when it is missing or damaged."""
        return read_yaml(self.config_file) or {}

    def config(self) -> RunConfig:
        """The configuration that was run.

        Raises:
            ValueError: config.yaml is missing, damaged, or that of a refused point or of a later version.
        """
        return RunConfig.model_validate(self.raw_config())

    def later_version(self) -> str:
        """What config.yaml holds that only a later version knows: `parallel.cp=2 is not known`; empty for any other.

        That of a refused point may hold what no version knows.
        """
        try:
            file = self.config_file.stat()
        except OSError:
            return ""
        unknown = _unknown_in(self.config_file, file.st_mtime_ns, file.st_size)
        is_refused = unknown and (read_json(self.status_file) or {}).get("status") == "invalid"
        return "" if is_refused else unknown

    def command(self) -> str:
        """The command that repeats the point; empty when unknown."""
        try:
            return self.command_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return ""

    def write_status(self, status: Status, reason: str | None = None, **extra: Any) -> None:
        """Merge into status.json: the status, its time, who wrote it, and whatever else is given.

        Args:
            reason: one sentence, for every status but ok.
            extra: such as `environment`, kept until overwritten.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        content = read_json(self.status_file) or {}
        if status == "running" and content.get("status") == "pending":
            content["started"] = now
        content |= {"status": status, "reason": reason, **this_process()}
        content.setdefault("started", now)
        if status != "pending" and status != "running":
            content["ended"] = now
        write_json(self.status_file, content | extra)

    def status(self) -> dict[str, Any]:
        """status.json, corrected by what the files show.

        Without a readable status, or when the process that wrote `pending` or `running` is gone from this
        host, the attempt was interrupted; ok without a complete result is a crash.
        """
        content = read_json(self.status_file)
        if content is None or "status" not in content:
            return {"status": "interrupted", "reason": f"{self.status_file.name} is missing or damaged"}
        if content["status"] in ("pending", "running") and not is_alive(content):
            if "environment" in content and self.keep_partial_result():  # only the word that it was measured is missing
                ended = datetime.fromtimestamp(self.result_file.stat().st_mtime, UTC).isoformat(timespec="milliseconds")
                return content | {"status": "ok", "reason": None, "ended": ended}
            return content | {"status": "interrupted", "reason": "the process that ran it is gone"}
        if content["status"] == "ok" and self.result() is None:
            return content | {"status": "crashed", "reason": f"{self.result_file.name} is missing or damaged"}
        return content

    def keep_partial_result(self) -> bool:
        """Whether its ranks measured to the end; where they were ended after it, what they had becomes the result."""
        if self.result() is None and read_json(self.partial_result_file) is not None:
            with contextlib.suppress(OSError):  # a folder that can only be read
                self.partial_result_file.replace(self.result_file)
        return self.result() is not None

    def result(self) -> dict[str, Any] | None:
        """result.json; None when it is missing or damaged."""
        return read_measured(self.result_file)

    def wandb_run_id(self) -> str | None:
        """Id of its wandb run; None until that is written."""
        return (read_json(self.wandb_file) or {}).get("run_id")


@lru_cache(maxsize=4096)
def _unknown_in(config_file: Path, modified_ns: int, num_bytes: int) -> str:
    """What a configuration holds that only a later version knows; looked at once unless the file changes."""
    return of_a_later_version(read_yaml(config_file) or {})


def this_process() -> dict[str, Any]:
    """What names this process for good: `host`, `pid` and `pid_started`."""
    return {"host": platform.node(), "pid": os.getpid(), "pid_started": process_started(os.getpid())}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process, given as by `this_process`, still runs; assumed so on another host."""
    if process.get("host", platform.node()) != platform.node():
        return True
    pid = process.get("pid")
    started = process_started(pid) if isinstance(pid, int) else None
    return started is not None and process.get("pid_started") in (None, started)


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep, and everything that was tried for it."""

    path: Path

    @property
    def name(self) -> str:
        """Slug and identity: the name of its folder."""
        return self.path.name

    @property
    def slug(self) -> str:
        """Layout in short."""
        return self.name.rpartition("_")[0]

    @property
    def identity(self) -> str:
        """Eight hex digits that name what is computed."""
        return self.name.rpartition("_")[2]

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        found = [
            Attempt(path)
            for path in self.path.glob("attempt-*")
            if path.is_dir() and path.name.removeprefix("attempt-").isdecimal()
        ]
        return sorted(found, key=lambda attempt: attempt.number)

    def new_attempt(self) -> Attempt:
        """Make the folder of the next attempt; two processes that ask at once get two."""
        attempts = self.attempts()
        number = attempts[-1].number + 1 if attempts else 1
        while True:
            path = self.path / f"attempt-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return Attempt(path)

    def newest_finished(self) -> Attempt | None:
        """The last attempt that ended by itself, well or not; one of a later version says nothing."""
        for attempt in reversed(self.attempts()):
            if attempt.status()["status"] not in UNFINISHED and not attempt.later_version():
                return attempt
        return None

    def measured_in(self, environment: Mapping[str, Any]) -> list[Attempt]:
        """The attempts that ended well in an environment, oldest first: together they are one measurement."""
        statuses = [(attempt, attempt.status()) for attempt in self.attempts()]
        return [
            attempt
            for attempt, status in statuses
            if status["status"] == "ok"
            and not is_stale(status.get("environment") or {}, environment)
            and not attempt.later_version()
        ]

    def shown(self) -> Attempt | None:
        """The attempt a report shows: the newest finished one, else the newest; None without any it can read."""
        return self.newest_finished() or next((a for a in reversed(self.attempts()) if not a.later_version()), None)


@dataclass(frozen=True)
class SweepDirectory:
    """Everything asked for under one name."""

    results_dir: str | Path
    name: str

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.results_dir).expanduser() / self.name

    @property
    def request_file(self) -> Path:
        """What was asked for last, and on what."""
        return self.path / "sweep.yaml"

    def prepare(self, request: Mapping[str, Any] | None = None) -> None:
        """Make the folder, and write sweep.yaml when there is a request.

        Args:
            request: what is asked for and its `environment`; an attempt measured in another environment is
                shown as stale.

        Raises:
            ConfigError: the folder can't be written.
        """
        try:
            (self.path / "points").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path / "points"):
                pass
            if request is not None:
                write_yaml(self.request_file, request)
        except OSError as error:
            raise ConfigError(
                f"results_dir={str(self.results_dir)!r} can't hold sweep {self.name!r}: {error.strerror} "
                f"({error.filename or self.path}); set results_dir to a folder you can write to"
            ) from None

    def request(self) -> dict[str, Any]:
        """sweep.yaml; empty when there is none."""
        return read_yaml(self.request_file) or {}

    def point(self, config: RunConfig, identity: str) -> Point:
        """The point of a configuration, whether it was tried or not."""
        return Point(self.path / "points" / f"{config.slug}_{identity}")

    def points(self) -> list[Point]:
        """All points ever asked for, by name."""
        return [Point(path) for path in sorted(self.path.glob("points/*")) if path.is_dir()]

    def record_invalid(
        self, overrides: Sequence[str], raw: Mapping[str, Any] | None, reason: str, command: str
    ) -> Attempt:
        """Keep a point that was refused before start: one attempt with status `invalid`, however often it is asked.

        Args:
            overrides: the point as it was asked for; they name it, as it has no identity.
            raw: the composed configuration, None when it did not compose; kept as config.yaml.
            reason: one sentence.
            command: what repeats the refusal.
        """
        point = self._invalid_point(overrides)
        attempts = point.attempts()
        attempt = attempts[-1] if attempts else point.new_attempt()
        write_yaml(attempt.config_file, _nested(overrides) if raw is None else raw)
        write_atomically(attempt.command_file, command + "\n")
        attempt.write_status("invalid", reason, overrides=list(overrides))
        return attempt

    def forget_invalid(self, overrides: Sequence[str]) -> None:
        """Drop the refusal of a point that can run after all, so that it has one row."""
        shutil.rmtree(self._invalid_point(overrides).path, ignore_errors=True)

    def _invalid_point(self, overrides: Sequence[str]) -> Point:
        digest = hashlib.sha256("\0".join(sorted(overrides)).encode(errors="backslashreplace")).hexdigest()
        return Point(self.path / "points" / f"invalid_{digest[:8]}")


def _nested(overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=1` as {a: {b: 1}}, for overrides that did not compose."""
    raw: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.lstrip("+~").partition("=")
        *sections, last = key.split(".")
        if not (equals and last):
            continue
        node: Any = raw
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            try:
                node[last] = yaml.safe_load(text)
            except (ValueError, yaml.YAMLError):
                node[last] = text
    return raw
