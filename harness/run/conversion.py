"""launchers/convert.py: weights between folders that `save_pretrained` writes and checkpoints of ours.

One process, which holds no more than two tensors at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from harness.checkpoints import (
    CARRIED,
    FORMAT,
    META,
    FileRecord,
    Meta,
    SavedConfig,
    checksum,
    find_checkpoint,
    read_meta,
    verify_files,
)
from harness.errors import ConfigError
from harness.model.groups import TensorParallel
from harness.model.pretrained import read_part, read_tensor
from harness.record.store import write_json
from harness.run.carried import (
    MANIFEST,
    UNUSED,
    FileEntry,
    Manifest,
    TensorEntry,
    carry,
    read_manifest,
    records_below,
    sync,
    unused_tensors,
)
from harness.run.checkpoint import Box, BoxSavePlanner, WeightReader, Writer, boxes_of, parts_of
from harness.run.safetensors_files import DTYPES, Bytes, Entry, bytes_of, stored_bytes, write_safetensors
from harness.spec.config import AnyModel, Model
from harness.spec.parameters import ParameterSpec, parameter_table
from harness.spec.pretrained import (
    CONFIG,
    INDEX,
    ITEM_BYTES,
    WHOLE,
    Pretrained,
    StoredTensor,
    check_copies,
    is_pretrained,
    open_pretrained,
    same_where_comparable,
)
from harness.spec.pretrained import sha256_of as sha256_of_file
from harness.spec.resolve import first_problem
from harness.spec.transformers_config import read_shape, resolve_model, written_config
from harness.spec.transformers_names import assign, counterparts, format_of, their_shapes

MOST_SHARD_BYTES = 5 * 10**9
"""Of a file of weights that is written anew, as `save_pretrained` splits them."""
SINGLE = TensorParallel.single()
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Types by the names of torch -> by those of safetensors."""


class Converted(NamedTuple):
    """What was written."""

    model: Model
    num_tensors: int
    num_bytes: int


def main(arguments: Sequence[str]) -> int:
    """Convert; 2 for what can't be, with one sentence."""
    parser = argparse.ArgumentParser(prog="convert.py", add_help=False)  # the launcher's docstring is its help
    commands = parser.add_subparsers(dest="command", required=True)
    of_import, of_export = (commands.add_parser(name, add_help=False) for name in ("import", "export"))
    for command in (of_import, of_export):
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    of_export.add_argument("--dtype", choices=CODES)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        if options.command == "import":
            done = import_weights(options.source, options.target)
        else:
            done = export_weights(options.source, options.target, options.dtype)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{done.model.family} {done.model.name}: {done.num_tensors} tensors, {done.num_bytes:,} bytes of weights")
    print(f"{options.target} written in {time.monotonic() - started:.1f} s")
    return 0


def _end(number: int, _: object) -> None:
    """A signal to end takes the way of an error, which leaves nothing half-written."""
    sys.exit(128 + number)


def import_weights(source: Path, target: Path) -> Converted:
    """Write a checkpoint of the weights in a folder, which holds no state of an optimizer.

    Raises:
        ConfigError: the folder is not whole, or not implemented, or there is something at `target`.
        OSError: it can't be written.
    """
    if not is_pretrained(source):
        raise ConfigError(f"{source} holds no {CONFIG}; give a folder that save_pretrained wrote")
    model = _model_of({"dropout": 0.0} | read_shape(source / CONFIG)[0])
    pretrained = open_pretrained(source, model)
    check_copies(pretrained, _same)
    with _whole(target) as unfinished:
        writer = Writer(unfinished, single_file_per_rank=False)  # which keeps all tensors of a file until it is closed
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
                save({}, storage_writer=writer, planner=_PretrainedPlanner(pretrained), no_dist=True)
        except CheckpointException as failure:
            raise next(iter(failure.failures.values()))[0] from failure
        files = {
            file.name: FileRecord(num_bytes=file.stat().st_size, crc32=checksum(file))
            for file in sorted(unfinished.iterdir())
        }
        carry(pretrained, unfinished / CARRIED, with_hashes=True)
        files |= records_below(unfinished, unfinished / CARRIED)
        saved = SavedConfig(model=model.model_dump(mode="json"), train={})
        meta = Meta(format=FORMAT, step=0, optimizer_step=0, scheduler_step=0, loss_scale={}, files=files, config=saved)
        write_json(unfinished / META, meta.model_dump())
    trained = [t for stored in pretrained.assignment.sources.values() for t in stored]
    return Converted(
        model, len(pretrained.tensors), sum(pretrained.tensors[t].stop - pretrained.tensors[t].start for t in trained)
    )


def _model_of(section: Mapping[str, Any]) -> Model:
    """The typed shape of a model, which sees what its family is made for."""
    try:
        model = Model.model_validate(resolve_model(section))
    except ValidationError as error:
        raise ConfigError(f"model.{first_problem(error)}") from None
    return model.model_copy(update={"causal": model.architecture.causal})


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether a copy holds the values of the other tensor, in its own type."""
    if first.dtype == second.dtype:
        return same_where_comparable(first, second)
    copy = read_tensor(second)
    return torch.equal(read_tensor(first).to(copy.dtype), copy)


class _PretrainedPlanner(BoxSavePlanner):
    """Writes the parts of all parameters, each read when its turn comes."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._reads: dict[MetadataIndex, Callable[[], Tensor]] = {}
        boxes = []
        for spec in parameter_table(pretrained.model).values():
            stored, _ = pretrained.parts_of(spec.name)
            for index, part in enumerate(parts_of(spec, 0, 1)):
                dtype = DTYPES[stored[min(index, len(stored) - 1)].dtype]
                outline = torch.empty(part.shape, dtype=dtype, device="meta")
                box = Box(f"weight/{part.name}", part.shape, (0,) * len(part.shape), outline)
                boxes.append(box)
                self._reads[box.index] = _reading(pretrained, spec, index)
        super().__init__(boxes)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """A part."""
        return self._reads[index]().contiguous()


def _reading(pretrained: Pretrained, spec: ParameterSpec, index: int) -> Callable[[], Tensor]:
    size = spec.parts[index][1] if spec.parts else 0
    return lambda: read_part(pretrained, spec, index, 0, size)


def export_weights(source: Path, target: Path, dtype: str | None = None) -> Converted:
    """Write the weights of a checkpoint as `save_pretrained` would, with all that came with them.

    Args:
        dtype: of weights, by the name that torch has for it; None: the one they came in, fp32 for others.

    Raises:
        ConfigError: the checkpoint is damaged, `transformers` has no such model, or there is something at `target`.
        OSError: it can't be written.
    """
    checkpoint = find_checkpoint(str(source), "CHECKPOINT_DIR")
    meta = read_meta(checkpoint)
    verify_files(checkpoint, meta)
    try:
        model = TypeAdapter[Model](AnyModel).validate_python(meta.config.model)
    except ValidationError as error:
        raise ConfigError(f"{checkpoint / META}: model.{first_problem(error)}; it can't be exported") from None
    format_of(model)
    if model.causal != model.architecture.causal:
        raise ConfigError(
            f"{checkpoint} was trained with train.objective={'causal' if model.causal else 'masked'}, for which "
            f"no config.json of a {model.family} is written; use a family that is made for it"
        )
    layout = read_manifest(checkpoint) or _fresh_layout(model)
    if dtype is not None:
        layout = _in_dtype(layout, model, CODES[dtype])
    tensors = _Tensors(checkpoint, model, layout)
    with _whole(target) as unfinished:
        written = _write_weights(unfinished, layout, tensors)
        _write_others(unfinished, checkpoint, model, layout, dtype)
        for path in sorted(unfinished.rglob("*")):
            name = path.relative_to(unfinished).as_posix()
            if path.is_file() and name not in written.files:
                written.files[name] = FileEntry(sha256=sha256_of_file(path))
                sync(path)
        write_json(unfinished / MANIFEST, written.model_dump())
    trained = [name for names in tensors.assignment.sources.values() for name in names]
    return Converted(model, len(layout.tensors), sum(_num_bytes(layout.tensors[name]) for name in trained))


def _fresh_layout(model: Model) -> Manifest:
    """Files and names of a model that came from nowhere else, in fp32."""
    entries: dict[str, TensorEntry] = {}
    shard, used = 1, 0
    for spec in parameter_table(model).values():
        theirs, _ = counterparts(spec.name, format_of(model))
        for name, shape in zip(theirs, their_shapes(spec, format_of(model)), strict=True):
            num_bytes = math.prod(shape) * ITEM_BYTES["F32"]
            if used and used + num_bytes > MOST_SHARD_BYTES:
                shard, used = shard + 1, 0
            used += num_bytes
            entries[name] = TensorEntry(file=str(shard), dtype="F32", shape=shape, sha256=None)
    names = {"1": WHOLE} if shard == 1 else {str(k + 1): _shard_name(k, shard) for k in range(shard)}
    tensors = {name: entry.model_copy(update={"file": names[entry.file]}) for name, entry in entries.items()}
    files = {name: FileEntry(sha256=None, metadata={"format": "pt"}) for name in names.values()}
    return Manifest(files=files, tensors=tensors)


def _shard_name(index: int, number: int) -> str:
    return f"model-{index + 1:05d}-of-{number:05d}.safetensors"


def _in_dtype(layout: Manifest, model: Model, dtype: str) -> Manifest:
    """The same with other types of all weights."""
    unused = set(assign(layout.tensors, model).unused)
    tensors = {
        name: entry if name in unused else entry.model_copy(update={"dtype": dtype})
        for name, entry in layout.tensors.items()
    }
    return layout.model_copy(update={"tensors": tensors})


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


class _Tensors:
    """The bytes of tensors of theirs, from a checkpoint of ours."""

    def __init__(self, checkpoint: Path, model: Model, layout: Manifest) -> None:
        self.assignment = assign(layout.tensors, model)
        self._model, self._layout = model, layout
        self._table = parameter_table(model)
        self._reader = WeightReader(checkpoint, model, "CHECKPOINT_DIR")
        self._unused = unused_tensors(checkpoint)
        sources = self.assignment.sources
        self._places = {theirs: (name, index) for name, all_ in sources.items() for index, theirs in enumerate(all_)}
        self._places |= {copy: (name, 0) for copy, name in self.assignment.copies.items()}

    def content_of(self, name: str) -> Iterable[Bytes]:
        """Of one tensor."""
        return stored_bytes(self._unused[name]) if name in self._unused else self._trained(name)

    def _trained(self, theirs: str) -> Iterator[Bytes]:
        name, index = self._places[theirs]
        dtype, spec = DTYPES[self._layout.tensors[theirs].dtype], self._table[name]
        if len(self.assignment.sources[name]) > 1:
            part = list(parts_of(spec, 0, 1))[index]
            read = torch.empty(part.shape, dtype=dtype)
            self._reader.read([Box(part.name, part.shape, (0,) * len(part.shape), read)])
        else:
            read = torch.empty(spec.shape, dtype=dtype)
            self._reader.read(boxes_of(spec, SINGLE, 0, read.view(-1)))
        transposed = counterparts(name, format_of(self._model))[1]
        yield bytes_of(read.t() if transposed else read)


def _write_weights(folder: Path, layout: Manifest, tensors: _Tensors) -> Manifest:
    """Write all files of weights; what was written."""
    by_file: dict[str, list[Entry]] = {}
    for name, entry in layout.tensors.items():
        by_file.setdefault(entry.file, []).append(Entry(name, entry.dtype, entry.shape, _num_bytes(entry)))
    written = Manifest(files={}, tensors={})
    for file, entries in by_file.items():
        metadata = layout.files[file].metadata
        digests, digest = write_safetensors(folder / file, metadata, entries, tensors.content_of)
        written.files[file] = FileEntry(sha256=digest, metadata=metadata)
        for name, of_tensor in digests.items():
            written.tensors[name] = layout.tensors[name].model_copy(update={"sha256": of_tensor})
    return written


def _write_others(folder: Path, checkpoint: Path, model: Model, layout: Manifest, dtype: str | None) -> None:
    """Write all that is no weights: what was carried along, or a config.json of the model's shape."""
    carried = checkpoint / CARRIED
    if carried.exists():
        ours = {MANIFEST, UNUSED}
        shutil.copytree(carried, folder, dirs_exist_ok=True, ignore=lambda at, _: ours if Path(at) == carried else ())
    else:
        _write_settings(folder / CONFIG, written_config(model, dtype or "float32"))
    files = {entry.file for entry in layout.tensors.values()}
    num_bytes = sum(map(_num_bytes, layout.tensors.values()))
    if not carried.exists() and len(files) > 1:
        weight_map = {name: entry.file for name, entry in layout.tensors.items()}
        _write_settings(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    if carried.exists() and dtype is not None:
        settings = json.loads((folder / CONFIG).read_text())
        settings.pop("torch_dtype", None)
        _write_settings(folder / CONFIG, settings | {"dtype": dtype})
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            index.setdefault("metadata", {})["total_size"] = num_bytes
            _write_settings(folder / INDEX, index)


def _write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; an error, or being told to end, leaves nothing of it.

    Raises:
        ConfigError: there is something already.
    """
    _check_free(target)
    target = target.absolute()
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.unfinished-*"):
        with suppress(FileNotFoundError), _lock(leftover) as is_dead:
            if is_dead:
                shutil.rmtree(leftover, ignore_errors=True)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with _lock(unfinished):
            yield unfinished
            sync(unfinished)
            _check_free(target)
            unfinished.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already; give a folder that does not, or an empty one")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold a folder, at most until this process ends; False where another does, or the file system knows no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        os.close(descriptor)
