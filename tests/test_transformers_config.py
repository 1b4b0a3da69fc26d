"""A transformers configuration is understood, known to be harmless, or refused by name; never ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.spec.config import RunConfig
from harness.spec.families import FAMILIES, gpt2, llama
from harness.spec.transformers_config import read_transformers_config, resolve_model
from tests.helpers import make_config
from tests.references import CLASSES, MODELS, transformers_config

GPT2_FIXED, LLAMA_FIXED = (family.ARCHITECTURE.transformers.fixed for family in (gpt2, llama))
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 300,
    "n_positions": 256,
    **NO_DROPOUT,
}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300}

LATER = {
    "causal": True, "sliding_window": None, "rope_scaling": None, "type_vocab_size": 0, "weights": None,
    "part": "model",
}  # fmt: skip


def write(folder: Path, settings: Any) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def load(folder: Path | str, *overrides: str) -> RunConfig:
    uncached: Any = make_config.__wrapped__  # tests write several files to one place
    return uncached("model=hf", f"model.path={folder}", *overrides)


def refusal(folder: Path, settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read_transformers_config(write(folder, settings))
    assert "config.json" in str(error.value)
    return str(error.value)


# --- what transformers itself writes


def test_saved_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config

    saved = GPT2Config(n_layer=3, n_embd=48, n_head=6, n_inner=100, vocab_size=300, n_positions=256, **NO_DROPOUT)
    saved.architectures, saved.dtype = ["GPT2LMHeadModel"], "bfloat16"
    saved.save_pretrained(tmp_path)
    model = load(tmp_path).model
    expected = {
        "name": tmp_path.name, "family": "gpt2", "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6,
        "num_key_value_heads": 6, "head_dim": 8, "intermediate_size": 100, "vocab_size": 300,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "norm_epsilon": 1e-5, "rope_theta": 10000.0,
        "initializer_range": 0.02, "dropout": 0.0, "compile": False, "onednn": None, **LATER,
    }  # fmt: skip
    assert model.model_dump() == expected


def test_saved_llama(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    saved = LlamaConfig(
        num_hidden_layers=3, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=300,
        intermediate_size=100, max_position_embeddings=256, rope_theta=5e5, rms_norm_eps=1e-5, initializer_range=0.01,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    saved.architectures = ["LlamaForCausalLM"]
    saved.save_pretrained(tmp_path)
    model = load(tmp_path).model
    expected = {
        "name": tmp_path.name, "family": "llama", "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 100, "vocab_size": 300,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "norm_epsilon": 1e-5, "rope_theta": 5e5,
        "initializer_range": 0.01, "dropout": 0.0, "compile": False, "onednn": None, **LATER,
    }  # fmt: skip
    assert model.model_dump() == expected


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.architecture.transformers])
def test_every_saved_shape_is_read(tmp_path: Path, name: str) -> None:
    """What is causal is not in a file: training says it."""
    saved = transformers_config(MODELS[name].model_copy(update={"causal": False}))
    saved.save_pretrained(tmp_path)
    read = resolve_model({"family": "hf", "path": str(tmp_path)})
    expected = MODELS[name].model_dump(exclude={"name", "causal", "compile", "onednn", "weights"})
    if expected["head_dim"] * expected["num_attention_heads"] == expected["hidden_size"]:
        read.setdefault("head_dim", expected["head_dim"])
    assert read.pop("name") == tmp_path.name
    assert {**LATER, **read} == {**LATER, **expected, "rope_theta": read["rope_theta"]}
    if MODELS[name].architecture.positions == "rotary":
        assert read["rope_theta"] == MODELS[name].rope_theta


@pytest.mark.parametrize("family", CLASSES)
def test_our_defaults_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """What a file leaves out means the same to both."""
    import transformers

    getattr(transformers, CLASSES[family][0])().save_pretrained(tmp_path)
    complete = resolve_model({"family": "hf", "path": str(tmp_path)})
    assert resolve_model({"family": "hf", "path": write(tmp_path, {"model_type": family})}) == complete
    assert complete["dropout"] == (0.1 if family in ("gpt2", "bert") else 0.0)


def test_older_files(tmp_path: Path) -> None:
    """Settings that published files of earlier versions carry."""
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "n_ctx": 1024, "summary_type": "cls_index", "torch_dtype": "float32",
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}  # fmt: skip
    llama = {"rope_theta": 500000, "rope_scaling": None, "pretraining_tp": 1, "_name_or_path": "x", "use_cache": True}
    assert load(write(tmp_path, GPT2 | gpt2)).model.hidden_size == 32
    assert load(write(tmp_path, LLAMA | llama)).model.rope_theta == 500_000.0


# --- what is refused


@pytest.mark.parametrize("setting", GPT2_FIXED)
def test_gpt2_settings_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    other = {bool: not GPT2_FIXED[setting], str: "relu", float: 0.1}[type(GPT2_FIXED[setting])]
    message = refusal(tmp_path, GPT2 | {setting: other})
    assert f"{setting}={other!r} is not implemented, only {GPT2_FIXED[setting]!r} is" in message


@pytest.mark.parametrize("setting", LLAMA_FIXED)
def test_llama_settings_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    other = {bool: True, str: "gelu", float: 0.1, int: 2}[type(LLAMA_FIXED[setting])]
    message = refusal(tmp_path, LLAMA | {setting: other})
    assert f"{setting}={other!r} is not implemented, only {LLAMA_FIXED[setting]!r} is" in message


@pytest.mark.parametrize("dropout", NO_DROPOUT)
def test_rates_of_dropout_that_differ_are_refused(tmp_path: Path, dropout: str) -> None:
    assert f"{dropout}=0.2" in refusal(tmp_path, GPT2 | {dropout: 0.2})
    absent = {key: value for key, value in GPT2.items() if key != dropout}  # means 0.1
    assert f"{dropout}=0.1" in refusal(tmp_path, absent)


def test_one_rate_of_dropout(tmp_path: Path) -> None:
    assert load(write(tmp_path, GPT2 | dict.fromkeys(NO_DROPOUT, 0.25))).model.dropout == 0.25


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5},
        {"type": "default", "rope_type": "llama3"},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "yarn"},
        "linear",
    ],
)
def test_scaled_rotary_positions_are_refused(tmp_path: Path, key: str, rope: Any) -> None:
    message = refusal(tmp_path, LLAMA | {key: rope})
    assert f"{key}={rope} is not implemented; only plain rotary positions are, and those of rope_type llama3" in message


LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
}  # fmt: skip


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_rotary_positions(tmp_path: Path, key: str) -> None:
    scaled = {"rope_type": "llama3", **LLAMA3_ROPE}
    model = load(write(tmp_path, LLAMA | {"rope_theta": 5e5, key: scaled})).model
    assert model.rope_theta == 5e5
    assert model.rope_scaling is not None
    assert model.rope_scaling.model_dump() == LLAMA3_ROPE
    assert load(write(tmp_path, LLAMA | {key: scaled | {"rope_theta": 7e5}})).model.rope_theta == 7e5
    assert "is not implemented" in refusal(tmp_path, LLAMA | {key: scaled | {"beta_fast": 32}})
    assert "is not implemented" in refusal(tmp_path, GPT2 | {key: scaled})
    with pytest.raises(ConfigError, match=r"model.rope_scaling.factor='8' is not valid"):
        load(write(tmp_path, LLAMA | {key: scaled | {"factor": "8"}}))


def test_saved_llama3(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}
    LlamaConfig(rope_parameters=rope).save_pretrained(tmp_path)
    section = read_transformers_config(str(tmp_path))
    assert (section["rope_scaling"], section["rope_theta"]) == (LLAMA3_ROPE, 5e5)


# --- rules that a family's entry states


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family whose files may switch on what is not implemented, and that looks both ways."""
    written = replace(
        llama.ARCHITECTURE.transformers,
        switches={"use_sliding_window": ("sliding_window", "max_window_layers")},
        harmless=frozenset({"pooler_type"}),
        fixed=LLAMA_FIXED | {"is_decoder": False},
        remedies={"is_decoder": "train.objective=causal does it"},
        defaults=llama.ARCHITECTURE.transformers.defaults | {"head_dim": 128},
    )
    monkeypatch.setitem(FAMILIES, "windowed", replace(llama.ARCHITECTURE, transformers=written, causal=False))
    return "windowed"


def test_switched_off_settings_mean_nothing(tmp_path: Path, windowed: str) -> None:
    file = LLAMA | {"model_type": windowed, "sliding_window": 4096, "max_window_layers": 28, "pooler_type": "first"}
    layers = {"layer_types": ["full_attention"] * 2}
    for settings in (file, file | {"use_sliding_window": False}, file | layers, file | {"layer_types": None}):
        section = read_transformers_config(write(tmp_path, settings))
        assert section.get("sliding_window") is None
    nothing = {"use_sliding_window": True, "sliding_window": None}
    assert read_transformers_config(write(tmp_path, file | nothing)) == section
    assert "use_sliding_window=true is not implemented" in refusal(tmp_path, file | {"use_sliding_window": True})
    assert "use_sliding_window=true" in refusal(tmp_path, LLAMA | {"model_type": windowed, "use_sliding_window": True})
    mixed = {"layer_types": ["full_attention", "sliding_attention"]}
    assert "setting layer_types=" in refusal(tmp_path, file | mixed)
    assert "setting sliding_window=4096 is not known" in refusal(tmp_path, LLAMA | {"sliding_window": 4096})


def test_head_dim_that_follows_from_nothing(tmp_path: Path, windowed: str) -> None:
    assert read_transformers_config(write(tmp_path, LLAMA | {"model_type": windowed}))["head_dim"] == 128


def test_direction_is_decided_where_it_can_be(tmp_path: Path, windowed: str) -> None:
    for decoder in (GPT2, LLAMA):
        assert read_transformers_config(write(tmp_path, decoder | {"is_decoder": True}))
    assert read_transformers_config(write(tmp_path, LLAMA | {"model_type": windowed, "is_decoder": False}))
    message = refusal(tmp_path, LLAMA | {"model_type": windowed, "is_decoder": True})
    assert message.endswith("is_decoder=True is not implemented, only False is; train.objective=causal does it")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", [{"type": "default"}, {"rope_type": "default", "type": "default"}, {}, None])
def test_plain_rotary_positions_in_every_spelling(tmp_path: Path, key: str, rope: Any) -> None:
    assert load(write(tmp_path, LLAMA | {"rope_theta": 5e5, key: rope})).model.rope_theta == 5e5
    if rope:
        assert load(write(tmp_path, LLAMA | {key: {**rope, "rope_theta": 7e5}})).model.rope_theta == 7e5


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    quantized = {"quant_method": "gptq", "bits": 4}
    assert "setting quantization_config=" in refusal(tmp_path, LLAMA | {"quantization_config": quantized})
    assert "setting n_layer=2 is not known" in refusal(tmp_path, LLAMA | {"n_layer": 2})
    assert load(write(tmp_path, LLAMA | {"sliding_window": None})).model.family == "llama"


@pytest.mark.parametrize("family", ["mixtral", None, ["llama"]])
def test_other_families_are_refused(tmp_path: Path, family: Any) -> None:
    assert f"model_type={family!r} is not implemented" in refusal(tmp_path, LLAMA | {"model_type": family})


def test_unreadable_files(tmp_path: Path) -> None:
    assert "model_type=None" in refusal(tmp_path, [1, 2])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_transformers_config(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_transformers_config(str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no readable config.json"):
        load(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"model=hf needs model.path"):
        make_config("model=hf")


def test_wrong_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.num_hidden_layers='2' is not valid"):
        load(write(tmp_path, LLAMA | {"num_hidden_layers": "2"}))
    with pytest.raises(ConfigError, match=r"model.rope_theta='x' is not valid"):
        load(write(tmp_path, LLAMA | {"rope_theta": "x"}))


# --- values that follow


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    model = load(write(tmp_path, LLAMA), "+model.num_hidden_layers=7", "+model.vocab_size=1000").model
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (7, 1000, 32)
    with pytest.raises(ConfigError, match=r"model.layers is not a configuration key"):
        load(tmp_path, "+model.layers=7")


def test_values_that_follow() -> None:
    model = resolve_model({"family": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32})
    assert model == {
        "family": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 4, "intermediate_size": 256,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"model.hidden_size=65 can't be split over model.num_attention_heads=4"):
        resolve_model({"hidden_size": 65, "num_attention_heads": 4})


def test_switches_are_true_or_false(tmp_path: Path) -> None:
    qwen2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": None}
    assert load(write(tmp_path, qwen2 | {"use_sliding_window": True})).model.sliding_window is None
    assert 'use_sliding_window="false" is not implemented, only false is' in (
        refusal(tmp_path, qwen2 | {"use_sliding_window": "false"})
    )


def test_a_configuration_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_transformers_config(str(tmp_path))


def test_slow_pairs_are_those_of_fewer_turns() -> None:
    with pytest.raises(ConfigError, match=r"high_freq_factor=1 is not above low_freq_factor=4; Llama 3.1 has 4 and 1"):
        make_config(
            "model=llama31_8b", "model.rope_scaling.low_freq_factor=4.0", "model.rope_scaling.high_freq_factor=1.0"
        )
