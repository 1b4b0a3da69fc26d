"""Checkpoints in one format for every layout, with torch.distributed.checkpoint.

What is kept are tensors of the whole model under global names, whatever the layout: `weight/NAME` as the
optimizer holds it (fp32; imported weights have the type of their file), `exp_avg/NAME` and `exp_avg_sq/NAME`. What the
layers fuse is kept as its parts, a tied weight once, the padding of the vocabulary not at all. Any layout reads what it
holds.

A rank writes what lies in the memory of its optimizer and asks no other rank for anything. Under ZeRO that is any
range of the flattened slice of a parameter: up to three rectangles (the end of a row, whole rows, the beginning of
a row), which is what `DTensor` can't describe and the planners of torch.distributed.checkpoint can.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from harness.checkpoints import (
    FORMAT,
    META,
    FileRecord,
    Meta,
    SavedConfig,
    checksum,
    complete_checkpoints,
    directory_of,
    read_meta,
)
from harness.errors import ConfigError
from harness.model.groups import TensorParallel
from harness.record.store import write_json
from harness.run.carried import carry_along, sync
from harness.run.engines.engine import Engine, Progress
from harness.spec.config import Model, RunConfig, Train
from harness.spec.parameters import ParameterSpec, parameter_table


def state_kinds(train: Train) -> tuple[str, ...]:
    """What is kept of every parameter."""
    return ("weight", "exp_avg", "exp_avg_sq") if train.optimizer == "adamw" else ("weight",)


class Part(NamedTuple):
    """A tensor of the checkpoint, and the part of it that a tensor-parallel rank holds."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    first_row: int
    """Of this part in the rank's slice of the parameter."""
    num_rows: int
    """Without padding."""
    row: int
    """Place of its first row in the whole tensor."""
    column: int
    """Place of its first column in the whole tensor."""


def parts_of(spec: ParameterSpec, tp_rank: int, tp_size: int) -> Iterator[Part]:
    """How the slice of a parameter falls into tensors of the checkpoint."""
    if spec.shard_dim != 0:
        column = 0 if spec.shard_dim is None else spec.shape[1] // tp_size * tp_rank
        yield Part(spec.name, spec.shape, 0, spec.shape[0], 0, column)
        return
    first_row = 0
    for part, size in spec.parts:
        share = -(-size // tp_size)  # the last rank's may be padded
        row = min(tp_rank * share, size)
        yield Part(_part_name(spec, part), (size, *spec.shape[1:]), first_row, min(share, size - row), row, 0)
        first_row += share


def _part_name(spec: ParameterSpec, part: str) -> str:
    """`blocks.3.attention.qkv.weight` has `blocks.3.attention.q.weight` and so on."""
    if len(spec.parts) == 1:
        return spec.name
    block, _, kind = spec.name.rsplit(".", 2)
    return f"{block}.{part}.{kind}"


def rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A range of a flattened matrix as (row, column, rows, columns): at most three, each contiguous."""
    while start < stop:
        row, column = divmod(start, width)
        rows = (stop - start) // width if column == 0 else 0
        columns = width if rows else min(width - column, stop - start)
        yield row, column, max(1, rows), columns
        start += max(1, rows) * columns


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor of the checkpoint, and the memory of this rank that holds it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def index(self) -> MetadataIndex:
        """What distinguishes it from others."""
        return MetadataIndex(self.name, self.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it is in the whole tensor."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.data.shape)


def boxes_of(spec: ParameterSpec, tp: TensorParallel, start: int, memory: Tensor) -> Iterator[Box]:
    """Boxes of a range of a parameter.

    Args:
        start: where `memory` `[n]` begins in this rank's flattened slice of the parameter.
    """
    columns = 1 if len(spec.shape) == 1 else spec.shape[1] // (tp.size if spec.shard_dim == 1 else 1)
    for row, column, num_rows, num_columns in rectangles(start, start + len(memory), columns):
        for part in parts_of(spec, tp.rank, tp.size):
            first, stop = max(row, part.first_row), min(row + num_rows, part.first_row + part.num_rows)
            if first < stop:
                offsets = (part.row + first - part.first_row, part.column + column)
                sizes = (stop - first, num_columns)
                data = memory[first * columns + column - start :][: sizes[0] * sizes[1]]
                dims = len(spec.shape)
                yield Box(part.name, part.shape, offsets[:dims], data.view(sizes[:dims]))


def state_boxes(engine: Engine, config: RunConfig, tied_copies: bool) -> Iterator[Box]:
    """All that this rank's optimizer holds, `tied_copies` as in `Engine.held`."""
    table, state = parameter_table(config.model), engine.optimizer.state
    for name, held in engine.held(tied_copies):
        tensors = {"weight": held.master.detach(), **state[held.master]}
        for kind in state_kinds(config.train):
            memory = tensors[kind].view(-1)[held.first : held.first + held.length]
            for box in boxes_of(table[name], engine.tp, held.start, memory):
                yield replace(box, name=f"{kind}/{box.name}")


def tensor_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint has."""
    weights = weight_shapes(config.model)
    kinds = state_kinds(config.train)
    return {f"{kind}/{name.removeprefix('weight/')}": shape for kind in kinds for name, shape in weights.items()}


def weight_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of weights that a checkpoint has."""
    parts = [part for spec in parameter_table(model).values() for part in parts_of(spec, 0, 1)]
    return {f"weight/{part.name}": part.shape for part in parts}


def save_checkpoint(
    folder: Path, engine: Engine, config: RunConfig, step: int, group: dist.ProcessGroup | None
) -> None:
    """Write the checkpoint of a step into `folder` and drop the oldest; a collective call of all ranks.

    Args:
        group: all ranks, over gloo; None for the default one.

    Raises:
        OSError: it can't be written; the others stay as they are.
    """
    target = directory_of(folder, step)
    unfinished = folder / f".{target.name}"
    first = dist.get_rank() == 0
    if first:
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
    dist.barrier(group)
    open_state(engine.optimizer)
    planner = BoxSavePlanner(state_boxes(engine, config, tied_copies=False))
    try:
        save({}, storage_writer=Writer(unfinished), planner=planner, process_group=group)
        files = _own_files(unfinished, group)
        if first:
            carried, began_from = carry_along(config, unfinished)
            meta = _meta(engine.progress()._replace(step=step), config, files | carried, began_from)
            write_json(unfinished / META, meta.model_dump())
            sync(unfinished)
            unfinished.rename(target)
            sync(folder)
            for outdated in complete_checkpoints(folder)[: -config.train.keep_checkpoints]:
                shutil.rmtree(outdated.rename(folder / f".{outdated.name}"))
    except (CheckpointException, OSError) as failure:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise _write_error(target, failure) from failure


def _own_files(directory: Path, group: dist.ProcessGroup | None) -> dict[str, FileRecord]:
    """Size and checksum of all files, on rank 0."""
    rank = dist.get_rank()
    names = [f"__{rank}_*", ".metadata"] if rank == 0 else [f"__{rank}_*"]
    own = {
        file.name: FileRecord(num_bytes=file.stat().st_size, crc32=checksum(file))
        for name in names
        for file in directory.glob(name)
    }
    gathered: list[dict[str, FileRecord]] | None = [{} for _ in range(dist.get_world_size())] if rank == 0 else None
    dist.gather_object(own, gathered, dst=0, group=group)
    return {name: record for records in gathered or () for name, record in sorted(records.items())}


def _meta(progress: Progress, config: RunConfig, files: dict[str, FileRecord], began_from: str | None) -> Meta:
    saved = SavedConfig(**config.model_dump(mode="json"), began_from=began_from)
    return Meta(format=FORMAT, files=files, config=saved, **progress._asdict())


def _write_error(target: Path, failure: BaseException) -> OSError:
    """Why a checkpoint could not be written, in one sentence."""
    cause, earlier = _cause(failure), complete_checkpoints(target.parent)
    reason = cause.strerror if isinstance(cause, OSError) else cause
    rest = f"; {earlier[-1].name} is the newest there" if earlier else ""
    return OSError(f"checkpoint {target} can't be written: {reason}{rest}")


def _cause(failure: BaseException) -> BaseException:
    """The first error of any rank."""
    return next(iter(failure.failures.values()))[0] if isinstance(failure, CheckpointException) else failure


def load_checkpoint(checkpoint: Path, engine: Engine, config: RunConfig, group: dist.ProcessGroup | None) -> int:
    """Restore the training of a checkpoint in this layout, and return its step; a collective call of all ranks.

    Args:
        group: all ranks, over gloo; None for the default one.

    Raises:
        ConfigError: the checkpoint is damaged or of another model.
    """
    meta = read_meta(checkpoint)
    reader = FileSystemReader(checkpoint)
    check_tensors(checkpoint, reader.read_metadata(), tensor_shapes(config))
    open_state(engine.optimizer)
    planner = BoxLoadPlanner(state_boxes(engine, config, tied_copies=True))
    try:
        load({}, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as failure:
        raise ConfigError(f"train.resume={str(checkpoint)!r} can't be read: {_cause(failure)}") from failure
    engine.restore(Progress(meta.step, meta.optimizer_step, meta.scheduler_step, meta.loss_scale))
    return meta.step


class WeightReader:
    """Weights of a checkpoint, as this process asks for them.

    Args:
        key: what was given its path.

    Raises:
        ConfigError: it is not a checkpoint of the model.
    """

    def __init__(self, checkpoint: Path, model: Model, key: str = "model.weights") -> None:
        self._checkpoint, self._reader = checkpoint, FileSystemReader(checkpoint)
        self.metadata = self._reader.read_metadata()
        check_tensors(checkpoint, _only_weights(self.metadata), weight_shapes(model), key)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def read(self, boxes: Iterable[Box]) -> None:
        """Fill the memory of boxes, whose names are those of parameters and their parts.

        Raises:
            ConfigError: the checkpoint can't be read.
        """
        planner = BoxLoadPlanner(replace(box, name=f"weight/{box.name}") for box in boxes)
        planner.set_up_planner({}, self.metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError, ValueError, AssertionError, pickle.UnpicklingError) as failure:
            raise ConfigError(f"{self._checkpoint} can't be read: {failure}; use another checkpoint") from failure

    def read_slice(self, spec: ParameterSpec, parameter: Tensor, tp: TensorParallel) -> None:
        """Fill this rank's slice of a parameter where it lies."""
        if spec.padded:
            parameter.zero_()
        self.read(boxes_of(spec, tp, 0, parameter.detach().view(-1)))


def _only_weights(metadata: Metadata) -> Metadata:
    """Without the state of an optimizer."""
    tensors = {name: saved for name, saved in metadata.state_dict_metadata.items() if name.startswith("weight/")}
    return replace(metadata, state_dict_metadata=tensors)


def check_tensors(
    checkpoint: Path, metadata: Metadata, expected: dict[str, tuple[int, ...]], key: str = "train.resume"
) -> None:
    """Refuse a checkpoint with other tensors than the model's.

    Raises:
        ConfigError: one is missing, too much, or of another shape.
    """
    found = {name: tuple(getattr(saved, "size", ())) for name, saved in metadata.state_dict_metadata.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        name = different[0]
        raise ConfigError(
            f"{key}={str(checkpoint)!r} does not fit the model: {len(different)} tensors differ, the first is "
            f"{name} with shape {found.get(name, 'none')} instead of {expected.get(name, 'none')}"
        )


def open_state(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state as its first step would, where it has taken none."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if isinstance(optimizer, torch.optim.AdamW) and not optimizer.state[parameter]:
            moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0, device=parameter.device), **moments}


class BoxSavePlanner(DefaultSavePlanner):
    """Writes boxes; one that several ranks hold is written by one of them."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = {box.index: box for box in boxes}

    def create_local_plan(self) -> SavePlan:
        """What this rank could write."""
        return SavePlan([_write_item(box) for box in self._boxes.values()])

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Memory of a box."""
        return self._boxes[index].data


def _write_item(box: Box) -> WriteItem:
    properties, shape = TensorProperties.create_from_tensor(box.data), torch.Size(box.shape)
    return WriteItem(box.index, WriteItemType.SHARD, tensor_data=TensorWriteData(box.chunk, properties, shape))


class Writer(FileSystemWriter):
    """Leaves checksums to us, and tells why the disk does not take a file, which torch's own error hides."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        computes_crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ or error from None
        finally:
            torch.serialization.set_crc32_options(computes_crc32)


class BoxLoadPlanner(DefaultLoadPlanner):
    """Fills boxes from whatever boxes were written."""

    metadata: Any

    def __init__(self, boxes: Iterable[Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = {box.index: box for box in boxes}

    def create_local_plan(self) -> LoadPlan:
        """What this rank needs."""
        saved = self.metadata.state_dict_metadata
        items = [create_read_items_for_chunk_list(b.name, saved[b.name], [b.chunk]) for b in self._boxes.values()]
        return LoadPlan([item for of_box in items for item in of_box])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Memory of a box."""
        return self._boxes[index].data
