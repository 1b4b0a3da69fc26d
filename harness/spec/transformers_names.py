"""Which tensor of a `transformers` file is which parameter of ours, by name and shape alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.errors import ConfigError
from harness.spec.architecture import TransformersFormat
from harness.spec.config import Model
from harness.spec.parameters import ParameterSpec, parameter_table


def format_of(model: Model) -> TransformersFormat:
    """How a model's family is written there.

    Raises:
        ConfigError: it is not, or not in this shape.
    """
    written = model.architecture.transformers
    if written is None:
        raise ConfigError(f"model={model.name} has no counterpart in transformers: {model.architecture.summary}")
    grouped = model.num_key_value_heads != model.num_attention_heads
    widened = model.num_attention_heads * model.head_dim != model.hidden_size
    if (grouped and "num_key_value_heads" not in written.keys) or (widened and "head_dim" not in written.keys):
        raise ConfigError(
            f"model={model.name} can't be a {model.family} of transformers, which has as many key-value heads as heads "
            "and head_dim = hidden_size / num_attention_heads; use family=llama"
        )
    for key, needed in (("sliding_window", ""), ("rope_scaling", "rope_theta"), ("type_vocab_size", "")):
        if getattr(model, key) and (needed or key) not in written.keys:
            raise ConfigError(
                f"model={model.name} can't be a {model.family} of transformers, which has no model.{key}; use another "
                "family"
            )
    for ours, theirs in written.keys.items():
        if theirs in written.fixed and getattr(model, ours) != written.fixed[theirs]:
            raise ConfigError(
                f"model={model.name} can't be a {model.family} of transformers, as model.{ours} is "
                f"{getattr(model, ours)!r} and not {written.fixed[theirs]!r}, without which names are others there"
            )
    if "type_vocab_size" in written.keys and model.type_vocab_size == 0:
        raise ConfigError(
            f"model={model.name} can't be a {model.family} of transformers, as model.type_vocab_size is 0, and one has "
            "an embedding for one kind of tokens at least"
        )
    return written


def counterparts(name: str, written: TransformersFormat) -> tuple[list[str], bool]:
    """Names in `transformers` of a parameter of ours, and whether the matrix is transposed there."""
    path, _, leaf = name.rpartition(".")
    index = ""
    if path.startswith("blocks."):
        _, index, path = path.split(".", 2)
    theirs = [f"{module.format(i=index)}.{leaf}" for module in written.modules[path]]
    return theirs, path in written.transposed and leaf == "weight"


def their_shapes(spec: ParameterSpec, written: TransformersFormat) -> list[tuple[int, ...]]:
    """Shapes in `transformers` of a parameter of ours, one per name."""
    theirs, transposed = counterparts(spec.name, written)
    if len(theirs) > 1:
        return [(size, *spec.shape[1:]) for _, size in spec.parts]
    return [spec.shape[::-1] if transposed else spec.shape]


@dataclass
class Assignment:
    """Names in files, by what they are."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    """Parameter of ours -> names that make it up, in the order of its parts."""
    copies: dict[str, str] = field(default_factory=dict)
    """Name of a copy -> the parameter of ours that it equals."""
    unused: list[str] = field(default_factory=list)
    """Names that are no part of what is trained."""


def assign(names: Iterable[str], model: Model) -> Assignment:
    """Sort the names in the files of a model, whatever version of `transformers` wrote them.

    Raises:
        ConfigError: one is missing, or is not the model's.
    """
    written, names = format_of(model), list(names)
    if len(names) < model.num_hidden_layers:
        raise ConfigError(
            f"the weights have {len(names)} tensors, which are too few for num_hidden_layers={model.num_hidden_layers} "
            "in config.json; use the config.json that belongs to the weights"
        )
    table = parameter_table(model)
    theirs = {name: counterparts(name, written)[0] for name in table}
    wanted = {their_name for several in theirs.values() for their_name in several}
    copies = {copy: name for copy, name in written.tied.items() if name in table and copy not in wanted}
    found, assignment = dict[str, str](), Assignment()
    for name in names:
        new = _renamed(name, written)
        known = next((n for n in (new, written.optional_prefix + new) if n in wanted or n in copies), None)
        if known in wanted and known not in found:
            found[known] = name
        elif known in copies:
            assignment.copies[name] = copies[known]
        elif any(re.search(pattern, n) for pattern in written.unused for n in (new, written.optional_prefix + new)):
            assignment.unused.append(name)
        else:
            raise ConfigError(f"the weights hold {name}, which model={model.name} does not have")
    if missing := [their_name for several in theirs.values() for their_name in several if their_name not in found]:
        raise ConfigError(
            f"the weights have no {missing[0]}, which a {written.class_name} has; the files are not those of "
            f"model={model.name}"
        )
    assignment.sources = {name: [found[their_name] for their_name in several] for name, several in theirs.items()}
    return assignment


def _renamed(name: str, written: TransformersFormat) -> str:
    """A name of an older file as it is now."""
    for old, new in written.old_names.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
