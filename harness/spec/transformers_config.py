"""The shape of a model from a local `transformers` configuration, read as plain JSON.

Every setting is either understood, known to be harmless, or refused by name: a setting that changes
the computation and isn't implemented (another activation, say) must never be ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.spec.architecture import TransformersFormat
from harness.spec.config import Model, RopeScaling
from harness.spec.families import FAMILIES

# Settings that say nothing about the computation of a training step.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype _name_or_path use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id task_specific_params id2label label2id
    num_labels problem_type return_dict output_hidden_states output_attentions summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    chunk_size_feed_forward is_encoder_decoder finetuning_task tokenizer_class prefix
    n_ctx gradient_checkpointing attn_implementation _attn_implementation""".split()
)

DECODER = frozenset({"is_decoder"})
"""Of families that look only back anyway."""

LLAMA3_KEYS = frozenset(RopeScaling.model_fields)
"""Of scaled rotary positions, the same there as here."""

UNUSED_ROPE_THETA = 10000.0
"""Of a family without rotary positions, where it has no meaning."""


def resolve_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a `model` section: read `model.path` for family `hf`, fill in values that follow.

    Raises:
        ConfigError: no readable configuration, or a setting that isn't implemented.
    """
    model = dict(raw)
    if model.get("family") == "hf":
        given = {key: value for key, value in model.items() if key not in ("family", "path")}
        model = read_transformers_config(model.get("path")) | given
    model.pop("path", None)
    if model.get("num_key_value_heads") is None:
        model["num_key_value_heads"] = model.get("num_attention_heads")
    hidden, heads = model.get("hidden_size"), model.get("num_attention_heads")
    if model.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        model["head_dim"] = _head_dim(hidden, heads)
    if model.get("intermediate_size") is None and isinstance(hidden, int):
        model["intermediate_size"] = 4 * hidden
    return model


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ConfigError(
            f"model.hidden_size={hidden_size} can't be split over model.num_attention_heads={num_heads}; "
            "make it a multiple, or set model.head_dim"
        )
    return hidden_size // num_heads


def read_transformers_config(path: str | None) -> dict[str, Any]:
    """`model` section from PATH/config.json.

    Raises:
        ConfigError: as for `resolve_model`.
    """
    if not path:
        raise ConfigError("model=hf needs model.path, a folder with a transformers config.json")
    file = Path(str(path)).expanduser() / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={path!r} holds no readable config.json; give a transformers model folder")
    section, rates = read_shape(file)
    return section | {"dropout": _dropout(rates, file)}


def read_shape(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model` section of a config.json without its dropout, and the rates of dropout in it by their names.

    Raises:
        ConfigError: as for `resolve_model`.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}); give a transformers model folder") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    family = settings.get("model_type") if isinstance(settings, dict) else None
    formats = {name: known.transformers for name, known in FAMILIES.items() if known.transformers is not None}
    if not isinstance(family, str) or family not in formats:
        raise ConfigError(f"{file}: model_type={family!r} is not implemented; the families are {', '.join(formats)}")
    written = formats[family]
    settings = _without_switched_off(settings, written, file)
    settings, scaling = _flatten_rope(settings, "rope_theta" in written.keys, file)
    harmless = HARMLESS | written.harmless | (DECODER if FAMILIES[family].causal else frozenset())
    _refuse_unimplemented(settings, written, harmless, file)
    section = {ours: settings.get(theirs, written.defaults[theirs]) for ours, theirs in written.keys.items()}
    section = (
        {"name": file.parent.resolve().name, "family": family, "rope_theta": UNUSED_ROPE_THETA} | section | scaling
    )
    return section, {key: settings.get(key, rate) for key, rate in written.dropout.items()}


def _dropout(rates: Mapping[str, Any], file: Path) -> Any:
    """The one rate that all are."""
    first = next(iter(rates.values()), 0.0)
    if any(rate != first for rate in rates.values()):
        found = ", ".join(f"{key}={rate!r}" for key, rate in rates.items())
        raise ConfigError(f"{file}: {found} differ, but only one rate for all is implemented; change them in that file")
    return first


def _without_switched_off(settings: Mapping[str, Any], written: TransformersFormat, file: Path) -> dict[str, Any]:
    """Without the settings that mean nothing because another one is false."""
    settings = dict(settings)
    for switch, (first, *others) in written.switches.items():
        value = settings.pop(switch, False)
        if value not in (True, False, None) or (value and settings.get(first, ...) is not None):
            raise ConfigError(
                f"{file}: {switch}={json.dumps(value)} is not implemented, only false is; change it in that file, or "
                f"make {first} null"
            )
        for key in (first, *others):
            settings.pop(key, None)
    layers = settings.get("layer_types")
    if isinstance(layers, list) and all(kind == "full_attention" for kind in layers):
        del settings["layer_types"]
    return settings


def _flatten_rope(settings: Mapping[str, Any], is_rotary: bool, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings with `rope_theta` of newer files where older ones have it, and our `rope_scaling` where there is one."""
    settings, scaling = dict(settings), dict[str, Any]()
    for key in ("rope_scaling", "rope_parameters"):
        found = settings.pop(key, None) or {}
        rope = found if isinstance(found, dict) else {"type": found}
        kinds = [rope[name] for name in ("type", "rope_type") if name in rope]
        numbers = {name: rope[name] for name in rope if name not in ("type", "rope_type", "rope_theta")}
        is_plain = all(kind == "default" for kind in kinds) and not numbers
        is_llama3 = is_rotary and numbers.keys() == LLAMA3_KEYS and all(kind == "llama3" for kind in kinds) and kinds
        if not is_plain and not is_llama3:
            raise ConfigError(
                f"{file}: {key}={found} is not implemented; only plain rotary positions are, and those of rope_type "
                f"llama3 with {', '.join(sorted(LLAMA3_KEYS))}"
            )
        scaling |= {"rope_scaling": numbers} if numbers else {}
        if "rope_theta" in rope:
            settings["rope_theta"] = rope["rope_theta"]
    return settings, scaling


def _refuse_unimplemented(
    settings: Mapping[str, Any], written: TransformersFormat, harmless: frozenset[str], file: Path
) -> None:
    known = {*written.keys.values(), *written.dropout, *harmless}
    for key, value in settings.items():
        if key in written.fixed:
            if value != written.fixed[key]:
                raise ConfigError(
                    f"{file}: {key}={value!r} is not implemented, only {written.fixed[key]!r} is; "
                    f"{written.remedies.get(key, 'change it in that file')}"
                )
        elif key not in known and value is not None:
            raise ConfigError(f"{file}: setting {key}={value!r} is not known to Shardwright, so it can't be honoured")


def written_config(model: Model, dtype: str) -> dict[str, Any]:
    """Content of a config.json for a model, as `transformers` 5 writes it.

    Args:
        dtype: of the weights, by the name that torch has for it.
    """
    written = model.architecture.transformers
    assert written is not None
    settings = {theirs: getattr(model, ours) for ours, theirs in written.keys.items()}
    if (theta := settings.pop("rope_theta", None)) is not None:
        scaling = model.rope_scaling
        kind = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling.model_dump()}
        settings["rope_parameters"] = {"rope_theta": theta, **kind}
    return {
        "architectures": [written.class_name],
        "model_type": model.family,
        "dtype": dtype,
        **settings,
        **written.fixed,
        **dict.fromkeys(written.dropout, model.dropout),
        **dict.fromkeys(written.switches, False),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),  # a tokenizer's, which is not known
    }
