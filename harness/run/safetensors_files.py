"""Safetensors files, written tensor by tensor: none is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.spec.pretrained import CHUNK_BYTES, StoredTensor

Bytes = bytes | memoryview
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights, as safetensors calls them."""


class Entry(NamedTuple):
    """A tensor of a file that is written."""

    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    num_bytes: int


def write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    entries: Sequence[Entry],
    content_of: Callable[[str], Iterable[Bytes]],
) -> tuple[dict[str, str], str]:
    """Write a file, with its tensors in their order, and bring it to the disk.

    Args:
        content_of: the bytes of a tensor, asked once for each.

    Returns:
        sha256 of every tensor by name, and of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, num_bytes in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = len(encoded).to_bytes(8, "little") + encoded
    whole, digests = hashlib.sha256(begin), dict[str, str]()
    with path.open("wb") as file:
        file.write(begin)
        for name, _, _, num_bytes in entries:
            digest, before = hashlib.sha256(), file.tell()
            for chunk in content_of(name):
                file.write(chunk)
                digest.update(chunk)
                whole.update(chunk)
            assert file.tell() - before == num_bytes, f"{name} has other than {num_bytes} bytes"
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests, whole.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor on the CPU, in the order in which they are written."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def stored_bytes(tensor: StoredTensor) -> Iterator[bytes]:
    """Of a tensor in a file, whatever its type."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            assert chunk, f"{tensor.file} ends within {tensor.name}"
            left -= len(chunk)
            yield chunk
