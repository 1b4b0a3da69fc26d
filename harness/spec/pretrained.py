"""Folders as `save_pretrained` writes them: what their files of weights hold, and whether it is the model's.

Only headers are read, so that the launchers refuse in milliseconds what can't be used. A safetensors file is the
length of its header in 8 bytes, the header (JSON), then the tensors one after the other, without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.machine import cache_folder
from harness.spec.config import Model
from harness.spec.parameters import ParameterSpec, parameter_table
from harness.spec.transformers_names import Assignment, assign, counterparts, format_of, their_shapes

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SAFETENSORS = ".safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Types of safetensors whose items are whole bytes."""
CHUNK_BYTES = 1 << 24
TRAINED = ("F32", "BF16", "F16")
"""Types of weights that are taken."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file."""

    name: str
    file: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""
    stop: int


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file, as its header describes it."""

    path: Path
    metadata: dict[str, str]
    tensors: list[StoredTensor]
    """In the order of their bytes."""


@dataclass(frozen=True)
class Pretrained:
    """The weights in a folder, checked to be those of a model."""

    folder: Path
    model: Model
    files: list[StoredFile]
    tensors: dict[str, StoredTensor]
    """All, by their names there."""
    assignment: Assignment

    def parts_of(self, name: str) -> tuple[list[StoredTensor], bool]:
        """The tensors that make up a parameter of ours, and whether the matrix is transposed there."""
        transposed = counterparts(name, format_of(self.model))[1]
        return [self.tensors[source] for source in self.assignment.sources[name]], transposed


def is_pretrained(folder: Path) -> bool:
    """Whether a folder is as `save_pretrained` leaves it, as far as names tell."""
    return (folder / CONFIG).is_file()


def open_pretrained(folder: Path, model: Model) -> Pretrained:
    """What the files of a folder hold.

    Raises:
        ConfigError: it is not whole, or not what the model has.
    """
    files = [read_header(file) for file in _weight_files(folder)]
    tensors = _by_name(folder, files)
    _check_tokenizer(folder, model)
    try:
        assignment = assign(tensors, model)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    for name, spec in parameter_table(model).items():
        _check_parameter(spec, [tensors[source] for source in assignment.sources[name]], model)
    for copy, name in assignment.copies.items():
        _check_parameter(parameter_table(model)[name], [tensors[copy]], model)
    return Pretrained(folder, model, files, tensors, assignment)


def _by_name(folder: Path, files: list[StoredFile]) -> dict[str, StoredTensor]:
    """Tensors of all files, each of which is in one of them, the one that the index names."""
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        if tensor.name in tensors:
            raise ConfigError(
                f"{tensor.file} holds {tensor.name}, and so does {tensors[tensor.name].file.name}; leave it in one"
            )
        tensors[tensor.name] = tensor
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            held = "no file has it" if name not in tensors else f"{tensors[name].file.name} has it"
            raise ConfigError(f"{folder / INDEX} says that {name} is in {file}, but {held}; copy the folder again")
    return tensors


def _check_tokenizer(folder: Path, model: Model) -> None:
    """Refuse the files of a tokenizer that has tokens which the model has not."""
    for name, highest_of in TOKENIZERS.items():
        try:
            highest = highest_of((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # none, or of another kind: it is carried along
        if highest >= model.vocab_size:
            raise ConfigError(
                f"{folder / name} has the token {highest}, but config.json says vocab_size={model.vocab_size}; use the "
                "tokenizer that belongs to the weights"
            )


def _highest_of_fast(content: str) -> int:
    """Of a tokenizer.json."""
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    highest: int = max([-1, *own, *(token["id"] for token in tokenizer.get("added_tokens") or ())])
    return highest


TOKENIZERS: dict[str, Callable[[str], int]] = {
    "tokenizer.json": _highest_of_fast,
    "vocab.json": lambda content: max([-1, *json.loads(content).values()]),
    "added_tokens.json": lambda content: max([-1, *json.loads(content).values()]),
    "vocab.txt": lambda content: len(content.splitlines()) - 1,
}
"""File -> the highest number of a token in it."""


def same_where_comparable(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of one type hold the same bytes; others take torch to compare."""
    return first.dtype != second.dtype or _same_bytes(first, second, json.dumps(_state([first.file, second.file])))


@cache
def _same_bytes(first: StoredTensor, second: StoredTensor, _: str) -> bool:
    """Read once until a file changes, which the state of both files tells."""
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        sizes = (min(CHUNK_BYTES, first.stop - at) for at in range(first.start, first.stop, CHUNK_BYTES))
        return all(one.read(size) == other.read(size) for size in sizes)


def check_copies(
    pretrained: Pretrained, same: Callable[[StoredTensor, StoredTensor], bool] = same_where_comparable
) -> None:
    """Refuse copies of tied weights that are none: there would be two values for one parameter.

    Raises:
        ConfigError: with the file and both names.
    """
    for copy, name in pretrained.assignment.copies.items():
        (source,) = pretrained.assignment.sources[name]
        if not same(pretrained.tensors[source], stored := pretrained.tensors[copy]):
            raise ConfigError(
                f"{stored.file}: {copy} differs from {source}, but they are one and the same in this model; "
                "mend tie_word_embeddings in its config.json, or the weights"
            )


def _check_parameter(spec: ParameterSpec, found: list[StoredTensor], model: Model) -> None:
    for tensor, shape in zip(found, their_shapes(spec, format_of(model)), strict=True):
        if tensor.shape != shape:
            raise ConfigError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but its config.json makes it {shape}; use the "
                "config.json that belongs to the weights"
            )
        if tensor.dtype not in TRAINED:
            raise ConfigError(
                f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, but weights are taken as "
                f"{', '.join(TRAINED)}; save the model unquantized in one of these"
            )


def _weight_files(folder: Path) -> list[Path]:
    """One, or those that the index names."""
    whole, index = folder / WHOLE, folder / INDEX
    if whole.exists():
        return [whole]
    if index.exists():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if not (folder / name).is_file():
                raise ConfigError(f"{index} names {name}, which is not there; copy the folder again")
        return [folder / name for name in names]
    if any((folder / name).exists() for name in PICKLES):
        raise ConfigError(
            f"{folder} holds its weights as a pickle, {PICKLES[0]}, which can run anything when it is read; convert it "
            f"where you trust it: AutoModel.from_pretrained(DIR).save_pretrained(DIR2), with the model's own class"
        )
    raise ConfigError(f"{folder} holds neither {WHOLE} nor {INDEX}; give a folder that save_pretrained wrote")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> name of its file, by the index; empty where one file holds all."""
    index = folder / INDEX
    if (folder / WHOLE).exists() or not index.exists():
        return {}
    try:
        names: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        others = [name for name in names.values() if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is damaged ({error}); copy the folder again") from None
    if others:
        raise ConfigError(
            f"{index} names {others[0]!r}, which is no name of a safetensors file; put the files beside it"
        )
    return names


def read_header(file: Path) -> StoredFile:
    """What a safetensors file holds.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        with file.open("rb") as content:
            num_bytes = os.fstat(content.fileno()).st_size
            length = int.from_bytes(content.read(8), "little")
            if num_bytes < 8 + length:
                raise _damaged(file, f"it has {num_bytes:,} bytes, and its header alone would have {8 + length:,}")
            header: dict[str, Any] = json.loads(content.read(length), object_pairs_hook=_without_repetition)
            metadata = header.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("metadata are texts")
            tensors = [_stored(name, file, entry, 8 + length) for name, entry in header.items()]
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}); make it readable") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _damaged(file, "its header is none of safetensors") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(file, f"{tensor.name} begins at byte {tensor.start:,} instead of {end:,}")
        end = tensor.stop
    if num_bytes != end:
        raise _damaged(file, f"it has {num_bytes:,} bytes, and its header tells of {end:,}")
    return StoredFile(file, metadata, tensors)


def _stored(name: str, file: Path, entry: dict[str, Any], base: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *entry["shape"])):
        raise ValueError("sizes are whole numbers")
    tensor = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)
    if tensor.dtype not in ITEM_BYTES:
        raise ConfigError(
            f"{file}: {name} is of type {tensor.dtype}, which is not known; save the model in another type"
        )
    needed = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    if stop - start != needed:
        raise _damaged(file, f"{name} has {stop - start:,} bytes instead of {needed:,}")
    return tensor


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _damaged(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{file} is damaged: {problem}; copy it again")


def content_hash(folder: Path) -> str:
    """Hash of config.json and of all that the files of weights hold, wherever they lie.

    Raises:
        ConfigError: there are none.
    """
    files = [folder / CONFIG, *_weight_files(folder)]

    def compute() -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(sha256_of, files))
        return hashlib.sha256(json.dumps([[f.name, d] for f, d in zip(files, found, strict=True)]).encode()).hexdigest()

    return remembered(files, compute)


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def remembered(files: Iterable[Path], compute: Callable[[], str]) -> str:
    """A digest that takes reading whole files, kept in the user's cache until one of them changes.

    Args:
        files: on whose content it depends.
    """
    entry = cache_folder("weights") / hashlib.sha256(json.dumps(_state(files)).encode()).hexdigest()[:32]
    with suppress(OSError, ValueError):
        digest = entry.read_text()
        if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size:
            return digest
    digest = compute()
    with suppress(OSError):  # then it is computed again next time
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(entry)
    return digest


def _state(files: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """What is another for files that were written since, whatever times they were given."""
    found = [(str(file), file.stat()) for file in map(Path.resolve, files)]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found]
