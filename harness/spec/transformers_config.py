"""The shape of a model from a local `transformers` configuration, read as plain JSON.

Every setting is either understood, known to be harmless, or refused by name: a setting that changes
the computation and isn't implemented (scaled rotary positions, say) must never be ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

# Settings that say nothing about the computation of a training step.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype _name_or_path use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id task_specific_params id2label label2id
    num_labels problem_type return_dict output_hidden_states output_attentions summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    chunk_size_feed_forward is_encoder_decoder is_decoder finetuning_task tokenizer_class prefix
    n_ctx gradient_checkpointing attn_implementation _attn_implementation""".split()
)

GPT2_SHAPE = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
GPT2_DEFAULTS: dict[str, Any] = {
    "n_layer": 12, "n_embd": 768, "n_head": 12, "n_inner": None, "vocab_size": 50257, "n_positions": 1024,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True,
}  # fmt: skip
# Implemented value of each setting; another value is refused.
GPT2_FIXED: dict[str, Any] = {
    "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False,
}  # fmt: skip
# Rates, which must be one, and their defaults.
GPT2_DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}

LLAMA_SHAPE = {
    "num_hidden_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
LLAMA_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None,
    "head_dim": None, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "pretraining_tp": 1,
}  # fmt: skip
LLAMA_DROPOUT: dict[str, float] = {}

FAMILIES = {
    "gpt2": (GPT2_SHAPE, GPT2_DEFAULTS, GPT2_FIXED, GPT2_DROPOUT),
    "llama": (LLAMA_SHAPE, LLAMA_DEFAULTS, LLAMA_FIXED, LLAMA_DROPOUT),
}


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
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"model.path={path!r} holds no readable config.json; give a transformers model folder"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    family = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"{file}: model_type={family!r} is not implemented; the families are {', '.join(FAMILIES)}")
    shape, defaults, fixed, dropout = FAMILIES[family]
    settings = _flatten_rope(settings, file)
    _refuse_unimplemented(settings, {*shape.values(), *dropout}, fixed, file)
    section = {ours: settings.get(theirs, defaults[theirs]) for ours, theirs in shape.items()}
    section["dropout"] = _dropout({key: settings.get(key, rate) for key, rate in dropout.items()}, file)
    return {"name": file.parent.resolve().name, "family": family, "rope_theta": LLAMA_DEFAULTS["rope_theta"]} | section


def _dropout(rates: Mapping[str, Any], file: Path) -> Any:
    """The one rate that all are."""
    first = next(iter(rates.values()), 0.0)
    if any(rate != first for rate in rates.values()):
        found = ", ".join(f"{key}={rate!r}" for key, rate in rates.items())
        raise ConfigError(f"{file}: {found} differ, but only one rate for all is implemented; change them in that file")
    return first


def _flatten_rope(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Move `rope_theta` of newer files where older ones have it; plain rotary positions only."""
    settings = dict(settings)
    plain = {"type": "default", "rope_type": "default"}
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.pop(key, None) or {}
        if not isinstance(rope, dict) or any(plain.get(name) != rope[name] for name in rope if name != "rope_theta"):
            raise ConfigError(f"{file}: {key}={rope} is not implemented; only plain rotary positions are")
        if "rope_theta" in rope:
            settings["rope_theta"] = rope["rope_theta"]
    return settings


def _refuse_unimplemented(settings: Mapping[str, Any], shape: set[str], fixed: Mapping[str, Any], file: Path) -> None:
    for key, value in settings.items():
        if key in fixed:
            if value != fixed[key]:
                raise ConfigError(
                    f"{file}: {key}={value!r} is not implemented, only {fixed[key]!r} is; change it in that file"
                )
        elif key not in shape and key not in HARMLESS and value is not None:
            raise ConfigError(f"{file}: setting {key}={value!r} is not known to Shardwright, so it can't be honoured")
