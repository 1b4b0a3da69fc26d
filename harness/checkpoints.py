"""Checkpoint directories: which are complete, which are intact, and what they say about themselves.

    <attempt>/checkpoints/step-00000040/
        meta.json           written last: `Meta`; without it a directory is no checkpoint
        .metadata           of torch.distributed.checkpoint: which file holds which part of which tensor
        __0_0.distcp ...    tensors, a file of each rank that wrote any
        transformers/       of weights that came from a `save_pretrained` folder: its other files, as they were

A checkpoint is written under a hidden name and gets its own when everything is on disk, so that a killed write
never leaves what could be taken for one. Any path that holds checkpoints stands for the newest of them.

No torch here: the launchers refuse what can't be resumed before they start anything.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import ConfigError

FOLDER = "checkpoints"
META = "meta.json"
CARRIED = "transformers"
FORMAT = 1

# What differs between trainings of one and the same model.
NOT_THE_MODEL = frozenset({"name", "initializer_range", "dropout", "compile", "onednn", "causal", "weights", "part"})


class FileRecord(BaseModel):
    """What a file must be."""

    num_bytes: int
    crc32: int


class SavedConfig(BaseModel):
    """Configuration of the run that wrote a checkpoint."""

    model_config = ConfigDict(extra="allow")

    model: dict[str, Any]
    train: dict[str, Any]
    """Empty where no training wrote it: weights that were imported."""
    began_from: str | None = None
    """Hash of the content that `model.weights` named."""


class Meta(BaseModel):
    """meta.json: all of a checkpoint but its tensors."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    step: int
    """Optimizer steps taken, which is the position in the data, too."""
    optimizer_step: int
    """Steps that AdamW counts; fewer where a step was skipped."""
    scheduler_step: int
    """Steps that the learning rate counts."""
    loss_scale: dict[str, float]
    """State of fp16's loss scaling; empty for other precisions."""
    files: dict[str, FileRecord]
    """By path, all but meta.json."""
    config: SavedConfig


def directory_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """All that were written to their end, oldest first."""
    return sorted(meta.parent for meta in folder.glob(f"step-*/{META}"))


def find_checkpoint(path: str, key: str = "train.resume") -> Path:
    """The checkpoint that `train.resume=path` means: the directory itself, or the newest below a run's.

    Args:
        path: of a checkpoint, of a folder of them, of an attempt or of a point.
        key: what was given the path.

    Raises:
        ConfigError: there is none.
    """
    place = Path(path).expanduser()
    if (place / META).exists():
        return place.resolve()
    folders = [place, place / FOLDER, *place.glob(f"attempt-*/{FOLDER}")]
    found = [checkpoint for folder in folders for checkpoint in complete_checkpoints(folder)]
    if not found:
        problem = "holds no complete checkpoint" if place.exists() else "does not exist"
        raise ConfigError(
            f"{key}={path!r} {problem}; give a directory {FOLDER}/step-NNNNNNNN of an earlier run, or the run's "
            "own (runs write them with train.checkpoint_interval)"
        )
    return max(found, key=lambda checkpoint: (checkpoint.name, checkpoint.stat().st_mtime_ns)).resolve()


def read_meta(checkpoint: Path) -> Meta:
    """What a checkpoint says about itself.

    Raises:
        ConfigError: meta.json is damaged or of another format.
    """
    file = checkpoint / META
    try:
        return Meta.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"{file} is damaged or not of format {FORMAT} ({problem}); use another checkpoint") from None


def fingerprint(checkpoint: str) -> str:
    """Hash of what a checkpoint holds, wherever it lies."""
    return hashlib.sha256((Path(checkpoint) / META).read_bytes()).hexdigest()


def check_resume(
    path: str,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    came_later: Mapping[str, Any],
    began_from: str | None = None,
) -> None:
    """Refuse a checkpoint that is damaged, of another model, or leaves nothing to train.

    Args:
        model, train: sections of the configuration that resumes.
        came_later: keys of the model, and the values they have in checkpoints from before they came.
        began_from: hash of what `model.weights` names beside it, if anything.

    Raises:
        ConfigError: with what is wrong and what to change.
    """
    checkpoint = Path(path)
    meta = read_meta(checkpoint)
    if not meta.config.train:
        raise ConfigError(
            f"train.resume={path!r} holds weights only, no training to go on with; use model.weights={path} to begin "
            "one from them"
        )
    if began_from is not None and began_from != meta.config.began_from:
        raise ConfigError(
            f"train.resume={path!r} is a checkpoint of a training that began from other weights than model.weights; "
            "leave model.weights out, or give those it began from"
        )
    saved_model, saved_optimizer = {**came_later, **meta.config.model}, meta.config.train.get("optimizer")
    for key in sorted(model.keys() & saved_model.keys() - NOT_THE_MODEL):
        if model[key] != saved_model[key]:
            raise ConfigError(
                f"train.resume={path!r} is a checkpoint of another model: its model.{key} is {saved_model[key]!r}, "
                f"here it is {model[key]!r}; give the model it was trained with, or another checkpoint"
            )
    if train["objective"] != (saved := meta.config.train.get("objective", "causal")):
        raise ConfigError(
            f"train.resume={path!r} was trained with train.objective={saved}, not {train['objective']}; use "
            f"train.objective={saved}"
        )
    if train["optimizer"] != saved_optimizer:
        raise ConfigError(
            f"train.resume={path!r} holds the state of {saved_optimizer}, not of train.optimizer={train['optimizer']}; "
            f"use train.optimizer={saved_optimizer}"
        )
    first_timed = meta.step + train["warmup_steps"] + 1
    if train["steps"] < first_timed:
        raise ConfigError(
            f"train.resume={path!r} is at step {meta.step}, which leaves nothing to time up to train.steps="
            f"{train['steps']} after train.warmup_steps={train['warmup_steps']}; use train.steps={first_timed} or more"
        )
    verify_files(checkpoint, meta)


def verify_files(checkpoint: Path, meta: Meta) -> None:
    """Compare every file with what meta.json says of it.

    Raises:
        ConfigError: a file is missing, cut or changed.
    """
    for name, record in meta.files.items():
        file = checkpoint / name
        try:
            num_bytes = file.stat().st_size
        except OSError as error:
            raise _damaged(f"{file} is missing ({error.strerror})") from None
        if num_bytes != record.num_bytes:
            raise _damaged(f"{file} has {num_bytes:,} bytes instead of {record.num_bytes:,}")
    files = [checkpoint / name for name in meta.files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, record, found in zip(files, meta.files.values(), pool.map(checksum, files), strict=True):
            if found != record.crc32:
                raise _damaged(f"the content of {file} has changed since it was written")


def _damaged(problem: str) -> ConfigError:
    return ConfigError(f"the checkpoint is damaged: {problem}; use an earlier one")


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    crc32 = 0
    with file.open("rb", buffering=0) as content:
        while chunk := content.read(1 << 22):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
