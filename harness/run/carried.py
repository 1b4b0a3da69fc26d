"""What a checkpoint carries along of the `save_pretrained` folder that its weights came from.

    <checkpoint>/transformers/
        config.json, tokenizer.json ...   every file there but weights, as it was
        unused.safetensors                tensors that are no part of what is trained, as they were
        manifest.json                     `Manifest`: names, types, shapes and files of all tensors there

So that trained weights go back under the names, into the files and in the types they had. A training takes it before
its first step and keeps it as checkpoints/.beginning, from where all its checkpoints have it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from harness.checkpoints import CARRIED, META, FileRecord, checksum, read_meta
from harness.errors import ConfigError
from harness.record.store import write_json
from harness.run.safetensors_files import Entry, stored_bytes, write_safetensors
from harness.spec.config import RunConfig
from harness.spec.initial_weights import is_checkpoint, weights_fingerprint
from harness.spec.pretrained import (
    INDEX,
    SAFETENSORS,
    WHOLE,
    Pretrained,
    StoredTensor,
    open_pretrained,
    read_header,
    sha256_of,
)

MANIFEST, UNUSED = "manifest.json", "unused.safetensors"
BEGINNING, BEGAN_FROM = ".beginning", "began_from.json"
"""Folder beside checkpoints with what they all carry along; a file there, which is written last."""
WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .ot .gguf .onnx .tflite .npz .mlmodel .distcp".split()
)
"""Of files that hold weights, in this or another form."""


class FileEntry(BaseModel):
    """A file of the folder."""

    model_config = ConfigDict(extra="forbid")

    sha256: str | None
    """None of a file of weights where a training carries it along, which changes them."""
    metadata: dict[str, str] = {}
    """Of a safetensors file, in its header."""


class TensorEntry(BaseModel):
    """A tensor of the folder."""

    model_config = ConfigDict(extra="forbid")

    file: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    sha256: str | None
    """None likewise."""


class Manifest(BaseModel):
    """manifest.json: a `save_pretrained` folder as it was, by names; tensors in the order of their bytes."""

    model_config = ConfigDict(extra="forbid")

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _stays_in_its_folder(self) -> Self:
        for name in self.files:
            if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is no path within a folder")
        for entry in self.tensors.values():
            if entry.file not in self.files or "/" in entry.file or not entry.file.endswith(SAFETENSORS):
                raise ValueError(f"{entry.file!r} is none of its {SAFETENSORS} files")
        return self


def carry(pretrained: Pretrained, target: Path, with_hashes: bool) -> None:
    """Write into `target` all of a folder but what is trained.

    Args:
        with_hashes: of all tensors and files of weights, too, which takes reading them.

    Raises:
        ConfigError: a manifest.json there is none of ours.
    """
    _check_manifest(pretrained.folder)
    target.mkdir()
    small = list(small_files(pretrained.folder))
    for name in small:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pretrained.folder / name, target / name)
    unused = [pretrained.tensors[name] for name in pretrained.assignment.unused]
    if unused:
        entries = [Entry(t.name, t.dtype, t.shape, t.stop - t.start) for t in unused]
        write_safetensors(target / UNUSED, {}, entries, lambda name: stored_bytes(pretrained.tensors[name]))
    files = {name: FileEntry(sha256=sha256_of(target / name)) for name in small}
    tensors = [tensor for file in pretrained.files for tensor in file.tensors]
    hashes: list[str | None] = [None] * len(tensors)
    if with_hashes:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            of_files = pool.map(sha256_of, (file.path for file in pretrained.files))
            hashes = list(pool.map(_sha256_of_tensor, tensors))
            for file, digest in zip(pretrained.files, of_files, strict=True):
                files[file.path.name] = FileEntry(sha256=digest, metadata=file.metadata)
    else:
        files |= {file.path.name: FileEntry(sha256=None, metadata=file.metadata) for file in pretrained.files}
    found = {
        t.name: TensorEntry(file=t.file.name, dtype=t.dtype, shape=t.shape, sha256=digest)
        for t, digest in zip(tensors, hashes, strict=True)
    }
    write_json(target / MANIFEST, Manifest(files=files, tensors=found).model_dump())


def _sha256_of_tensor(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for chunk in stored_bytes(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def small_files(folder: Path) -> Iterator[str]:
    """Paths in a folder of all files but weights, hidden ones, checkpoints and a manifest of ours."""
    checkpoints = {meta.parent for meta in folder.rglob(META) if (meta.parent / ".metadata").exists()} - {folder}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_other_index = file.name.endswith(".index.json") and (file.name != INDEX or (folder / WHOLE).exists())
        is_left = file.suffix in WEIGHT_SUFFIXES or is_other_index or is_hidden or str(name) == MANIFEST
        if file.is_file() and not is_left and checkpoints.isdisjoint(file.parents):
            yield name.as_posix()


def _check_manifest(folder: Path) -> None:
    """Refuse a manifest.json of somebody else's, in whose place ours would come; our own is made anew."""
    file = folder / MANIFEST
    try:
        if file.exists():
            Manifest.model_validate_json(file.read_bytes())
    except ValidationError:
        raise ConfigError(
            f"{file} is none that an export left, and would be replaced by one; move it elsewhere or rename it"
        ) from None


def read_manifest(checkpoint: Path) -> Manifest | None:
    """That of what a checkpoint carries; None where its training began fresh.

    Raises:
        ConfigError: it is damaged.
    """
    file = checkpoint / CARRIED / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes()) if file.parent.exists() else None
    except (OSError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"{file} is damaged ({problem}); use another checkpoint") from None


def unused_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """Those that a checkpoint carries, by name."""
    file = checkpoint / CARRIED / UNUSED
    return {tensor.name: tensor for tensor in read_header(file).tensors} if file.exists() else {}


def keep_beginning(config: RunConfig, folder: Path) -> None:
    """Keep beside the checkpoints of a training what its weights came with: their place may change or go meanwhile.

    Raises:
        ConfigError: `train.resume` or `model.weights` can't be read.
    """
    kept, origin = folder / BEGINNING, config.train.resume or config.model.weights
    shutil.rmtree(kept, ignore_errors=True)
    if origin is None:
        return
    began_from = read_meta(Path(origin)).config.began_from if config.train.resume else weights_fingerprint(origin)
    kept.mkdir(parents=True)
    if not is_checkpoint(Path(origin)):
        carry(open_pretrained(Path(origin), config.model), kept / CARRIED, with_hashes=False)
    elif (manifest := read_manifest(Path(origin))) is not None:
        shutil.copytree(Path(origin) / CARRIED, kept / CARRIED)
        write_json(kept / CARRIED / MANIFEST, _without_hashes(manifest).model_dump())
    write_json(kept / BEGAN_FROM, {"began_from": began_from})


def carry_along(config: RunConfig, checkpoint: Path) -> tuple[dict[str, FileRecord], str | None]:
    """Give a checkpoint of a training what its weights came with.

    Returns:
        What files it then has in addition, and the hash of the weights that the training began from, before it was
        resumed however often; None for fresh ones.
    """
    kept = checkpoint.parent / BEGINNING
    if not (kept / BEGAN_FROM).exists():
        keep_beginning(config, checkpoint.parent)
    if (kept / CARRIED).exists():
        shutil.copytree(kept / CARRIED, checkpoint / CARRIED)
    began_from = json.loads((kept / BEGAN_FROM).read_text())["began_from"] if kept.exists() else None
    return records_below(checkpoint, checkpoint / CARRIED), began_from


def _without_hashes(manifest: Manifest) -> Manifest:
    """Of weights, which are others now."""
    changed = {entry.file for entry in manifest.tensors.values()}
    files = {
        name: e.model_copy(update={"sha256": None} if name in changed else {}) for name, e in manifest.files.items()
    }
    tensors = {name: entry.model_copy(update={"sha256": None}) for name, entry in manifest.tensors.items()}
    return Manifest(files=files, tensors=tensors)


def records_below(checkpoint: Path, folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every file in a folder of a checkpoint, which are on disk then."""
    records = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            record = FileRecord(num_bytes=path.stat().st_size, crc32=checksum(path))
            records[path.relative_to(checkpoint).as_posix()] = record
    if folder.exists():
        sync(folder)
    return records


def sync(path: Path) -> None:
    """A file's content, or the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
