"""`model.weights`: where a training begins, a checkpoint of ours or a folder that `save_pretrained` wrote.

It brings the shape of its model, whatever file of conf/model/ was chosen. How the model is trained stays with the
configuration. Paths are resolved once, and the content is what counts: a moved folder is the same beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoints import META, NOT_THE_MODEL, find_checkpoint, fingerprint, read_meta, verify_files
from harness.errors import ConfigError
from harness.spec.config import Model
from harness.spec.pretrained import (
    CONFIG,
    PICKLES,
    check_copies,
    content_hash,
    is_pretrained,
    open_pretrained,
    remembered,
)
from harness.spec.transformers_config import read_shape

NOT_THE_SHAPE = NOT_THE_MODEL - {"name"}
"""Keys of a model that its weights don't bring."""


def with_shape(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section with the shape that belongs to its `weights`, whose path becomes absolute; without any, as is.

    Raises:
        ConfigError: there are no such weights, or their shape can't be told.
    """
    if not isinstance(path := section.get("weights"), str):
        return dict(section)
    place = find_weights(path)
    own = {key: value for key, value in section.items() if key in NOT_THE_SHAPE}
    return {"dropout": 0.0} | shape_of(place) | own | {"weights": str(place)}


def find_weights(path: str) -> Path:
    """The folder or checkpoint that `model.weights=path` means; a run's directory stands for its newest checkpoint.

    Raises:
        ConfigError: there is none.
    """
    place = Path(path).expanduser()
    if is_pretrained(place):
        return place.resolve()
    if any(place.glob("*.safetensors")) or any((place / name).exists() for name in PICKLES):
        raise ConfigError(
            f"model.weights={path!r} has no {CONFIG}, which says what its weights are; give a folder that "
            "save_pretrained wrote"
        )
    return find_checkpoint(path, "model.weights")


def is_checkpoint(place: Path) -> bool:
    """Whether it is one of ours, not a folder of `transformers`."""
    return (place / META).exists()


def shape_of(place: Path) -> dict[str, Any]:
    """`model` section of the model whose weights these are, without how it was trained.

    Raises:
        ConfigError: it can't be told, or is not implemented.
    """
    if not is_checkpoint(place):
        return read_shape(place / CONFIG)[0]
    left = NOT_THE_SHAPE - {"initializer_range"}
    return {key: value for key, value in read_meta(place).config.model.items() if key not in left}


def check_weights(model: Model) -> None:
    """Refuse weights that are damaged, or not those of their model.

    Raises:
        ConfigError: with the file, what is wrong and what to change.
    """
    assert model.weights is not None
    place = Path(model.weights)
    if is_checkpoint(place):
        _verified(place)
    else:
        check_copies(open_pretrained(place, model))


def weights_fingerprint(path: str) -> str:
    """Hash of what `model.weights=path` holds, wherever it lies."""
    place = Path(path)
    return fingerprint(path) if is_checkpoint(place) else content_hash(place)


def _verified(checkpoint: Path) -> None:
    """As `verify_files`, once until a file changes: all points of a sweep begin from the same."""
    meta = read_meta(checkpoint)

    def compute() -> str:
        verify_files(checkpoint, meta)
        return hashlib.sha256(fingerprint(str(checkpoint)).encode()).hexdigest()

    files = [file for file in (checkpoint / name for name in (META, *meta.files)) if file.exists()]
    if len(files) <= len(meta.files):
        verify_files(checkpoint, meta)  # says which is missing
    remembered(files, compute)
