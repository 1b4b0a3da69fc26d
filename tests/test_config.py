"""Configuration: typed, checked once, refused with what is wrong, the values and the remedy."""

from __future__ import annotations

import copy
import inspect
import json
import re
from functools import cache
from typing import Any, cast

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from harness.errors import ConfigError
from harness.machine import Machine
from harness.spec.checks import check_sweep_name
from harness.spec.config import REPOSITORY, RunConfig, Section
from harness.spec.deepspeed_keys import (
    DEEPSPEED_DERIVED,
    DEEPSPEED_KEYS,
    DEEPSPEED_PIPELINE_KEYS,
    check_deepspeed_settings,
)
from harness.spec.identity import identity
from harness.spec.resolve import load_config
from harness.spec.versions import later_keys
from tests.helpers import MACHINE, compose_raw

EIGHT_GPUS = Machine("cuda", "NVIDIA H100 80GB HBM3", num_devices=8, num_cores=64, memory_bytes=2**40)
SIXTEEN_CORES = Machine("cpu", "cpu", num_devices=16, num_cores=16, memory_bytes=2**35)

compose = cache(compose_raw)  # composing takes 0.1 s


def configure(overrides: str = "", machine: Machine = MACHINE) -> RunConfig:
    """The configuration with `overrides`, separated by spaces; those of a Hydra group come first."""
    words = overrides.split()
    groups = [word for word in words if "." not in word.split("=")[0] and not word.startswith("results_dir")]
    values = OmegaConf.from_dotlist([word for word in words if word not in groups])
    raw = OmegaConf.to_container(OmegaConf.merge(copy.deepcopy(compose(*groups)), values))
    return load_config(cast("dict[str, Any]", raw), machine)


REFUSED = [
    # typing
    ("parallel.ttp=2", "parallel.ttp is not a configuration key; did you mean parallel.tp?"),
    ("tracking.wandb.mod=offline", "did you mean tracking.wandb.mode?"),
    ("train.zzz=1", "train.zzz is not a configuration key; train has: micro_batch_size, "),
    ("parallel.tp=1.5", "parallel.tp=1.5 is not valid: input should be a valid integer"),
    ("parallel.tp=true", "parallel.tp=True is not valid"),
    ("parallel.tp=0", "parallel.tp=0 is not valid: input should be greater than or equal to 1"),
    ("parallel.dp=full", "parallel.dp='full' is not valid"),
    ("parallel.dp=fill parallel.tp=0", "parallel.tp=0 is not valid"),
    ("parallel.schedule=zb", "parallel.schedule=zb is not available; use gpipe, 1f1b, interleaved"),
    ("parallel.num_chunks=2", "parallel.schedule=1f1b: 1f1b has 1 chunk per stage, not 2"),
    ("parallel.partition=best", "input should be 'uniform', 'parameters' or 'cost'"),
    ("parallel.partition=[0,4] parallel.pp=2", "parallel.partition.0=0 is not valid"),
    ("parallel.zero_stage=4", "parallel.zero_stage=4 is not valid: input should be 0, 1, 2 or 3"),
    ("train.learning_rate=.nan", "train.learning_rate=nan is not valid: input should be a finite number"),
    ("train.adam_betas=[0.9]", "list should have at least 2 items"),
    ("train.precision=fp64", "input should be 'fp32', 'bf16' or 'fp16'"),
    ("train.seed=-1", "train.seed=-1 is not valid"),
    ("launch.master_port=70000", "launch.master_port=70000 is not valid"),
    ("launch.threads_per_rank=0", "launch.threads_per_rank=0 is not valid"),
    ("cluster.peak_flops.bf16=-1", "cluster.peak_flops.bf16=-1 is not valid"),
    ("data.kind=csv", "input should be 'text', 'synthetic' or 'hub'"),
    ("results_dir=5", "results_dir=5 is not valid"),
    ("sweep.points=[1]", "sweep.points.0=1 is not valid"),
    ("deepspeed.fp16=true", "deepspeed.fp16=True is not a section"),
    # model
    ("model.hidden_size=250", "model.hidden_size=250 can't be split over model.num_attention_heads=8"),
    ("model.num_attention_heads=0", "model.num_attention_heads=0 is not valid"),
    ("model.num_key_value_heads=3", "does not divide model.num_attention_heads=8; use one of [1, 2, 4, 8]"),
    ("model.num_key_value_heads=16", "model.num_key_value_heads=16 does not divide"),
    ("model=llama_tiny model.head_dim=33", "model.head_dim=33 is odd"),
    ("train.sequence_length=1025", "train.sequence_length=1025 exceeds model.max_position_embeddings=1024"),
    # tensor parallel
    (
        "model.hidden_size=768 model.num_attention_heads=12 parallel.tp=8",
        "model.num_attention_heads=12 can't be split over parallel.tp=8; use tp 1, 2, 3, 4, 6 or 12",
    ),
    ("model.intermediate_size=1023 parallel.tp=2", "model.intermediate_size=1023 can't be split over parallel.tp=2"),
    (
        "model=llama_tiny model.hidden_size=384 model.num_attention_heads=12 model.num_key_value_heads=4 parallel.tp=6"
        " model.intermediate_size=768",
        "model.num_key_value_heads=4 can neither be split over parallel.tp=6 nor shared evenly by its ranks; "
        "use tp 1, 2, 4 or 12",
    ),
    (
        "model=llama_tiny model.head_dim=2 model.num_key_value_heads=2 parallel.tp=8",
        "model.head_dim=2 can't be split over the 4 ranks of parallel.tp=8 that share a key-value head; use tp 1 or 2",
    ),
    # pipeline
    ("parallel.pp=5", "parallel.pp=5 stages exceed model.num_hidden_layers=4"),
    ("parallel.pp=2 parallel.partition=[4]", "parallel.partition=[4] names 1 stages, but parallel.pp=2"),
    ("parallel.pp=2 parallel.partition=[1,2]", "parallel.partition=[1, 2] places 3 layers"),
    ("parallel.zero_stage=2", "parallel.zero_stage=2 can't be combined with DeepSpeed's pipeline engine"),
    ("parallel.zero_stage=3", "use zero_stage 0 or 1"),
    (
        "parallel.sequence_parallel=true parallel.tp=4 train.sequence_length=130",
        "train.sequence_length=130 can't be sliced for parallel.sequence_parallel=true over parallel.tp=4; "
        "use a multiple of 4, or parallel.sequence_parallel=false",
    ),
    # batch
    (
        "train.global_batch_size=12 train.micro_batch_size=8",
        "train.global_batch_size=12 is not a multiple of train.micro_batch_size=8 x parallel.dp=1; "
        "use micro_batch_size 1, 2, 3, 4, 6 or 12",
    ),
    ("train.global_batch_size=7 parallel.dp=2", "use a dp that divides 7"),
    # training
    ("train.steps=2", "train.steps=2 leaves nothing to time after train.warmup_steps=2; use steps 3 or more"),
    ("train.adam_betas=[0.9,1.0]", "train.adam_betas=[0.9, 1.0] must be below 1"),
    ("train.precision=fp16", "train.precision=fp16 is not supported on CPU"),
    # devices
    ("parallel.dp=17 train.global_batch_size=17", "needs 17 ranks, but 2 cores hold at most 16"),
    ("parallel.dp=fill parallel.tp=4", "parallel.dp=fill can't share 2 devices among tp x pp = 4 ranks"),
    # names
    ("sweep.name=../up", "sweep.name='../up' is not a folder name"),
    ("sweep.name=.hidden", "not beginning with '.'"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_with_a_sentence(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_gpus_are_not_oversubscribed() -> None:
    assert configure("parallel.tp=8", EIGHT_GPUS).parallel.world_size == 8
    assert configure("train.precision=fp16 parallel.zero_stage=1", EIGHT_GPUS).train.precision == "fp16"
    with pytest.raises(ConfigError, match="needs 16 ranks, but there are 8 GPUs"):
        configure("parallel.tp=8 parallel.pp=2", EIGHT_GPUS)


ACCEPTED = [
    "parallel.partition=[3,1] parallel.pp=2",
    "parallel.pp=4 train.global_batch_size=2",  # fewer micro-batches than stages: mostly bubble, yet legal
    "model=llama_tiny parallel.tp=8",  # 4 key-value heads, each shared by 2 ranks
    "model.vocab_size=255 parallel.tp=2",  # padded
    "parallel.zero_stage=1",
    "parallel.sequence_parallel=true parallel.tp=2",
    "parallel.sequence_parallel=true train.sequence_length=127",  # without effect on one rank
    "model.dropout=0.1",
    "train.precision=bf16",
    "train.warmup_steps=0 train.steps=1",
    "parallel.dp=16 train.global_batch_size=16",  # up to max_ranks_per_core
    "deepspeed.zero_optimization.overlap_comm=true deepspeed.comms_logger.enabled=true",
    "deepspeed.pipeline.use_reentrant=true",
    "experiment=long_context",
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: str) -> None:
    configure(overrides)


@pytest.mark.parametrize("section", ["model", "train", "deepspeed"])
@pytest.mark.parametrize("value", [None, 5, "absent"])
def test_a_section_is_needed(section: str, value: Any) -> None:
    raw = dict(compose())
    raw[section] = value
    if value == "absent":
        del raw[section]
    with pytest.raises(ConfigError, match=f"{section}=.* is not a section"):
        load_config(raw, MACHINE)


# --- what is derived


@pytest.mark.parametrize(
    ("overrides", "machine", "dp"),
    [
        ("", MACHINE, 2),
        ("parallel.tp=2", MACHINE, 1),
        ("parallel.tp=2 parallel.pp=2", EIGHT_GPUS, 2),
        ("", EIGHT_GPUS, 8),
    ],
)
def test_dp_fill_uses_every_device(overrides: str, machine: Machine, dp: int) -> None:
    assert configure(f"parallel.dp=fill {overrides}", machine).parallel.dp == dp


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [("", 16), ("parallel.tp=2", 8), ("parallel.tp=2 parallel.pp=2 parallel.dp=2", 2), ("parallel.pp=3", 5),
     ("parallel.tp=8 parallel.pp=4", 1), ("launch.threads_per_rank=3", 3), ("parallel.dp=fill", 1)],
)  # fmt: skip
def test_threads_are_cores_per_rank(overrides: str, threads: int) -> None:
    config = configure(f"train.global_batch_size=16 {overrides}", SIXTEEN_CORES)
    assert config.launch.threads_per_rank == threads


def test_derived_values() -> None:
    config = configure("parallel.tp=2 parallel.dp=2 train.micro_batch_size=2 train.global_batch_size=16")
    assert (config.num_micro_batches, config.parallel.world_size, config.slug) == (4, 4, "tp2_pp1_dp2_mbs2")
    assert (config.model.head_dim, config.model.intermediate_size, config.model.num_key_value_heads) == (32, 1024, 8)
    assert [config.model.padded_vocab_size(tp) for tp in (1, 2, 3)] == [256, 256, 258]
    assert config.results_dir == str(REPOSITORY / "results")
    assert configure("results_dir=elsewhere").results_dir == "elsewhere"


def test_configuration_never_changes() -> None:
    config = configure()
    with pytest.raises(ValidationError):
        config.train.steps = 5  # type: ignore[misc]


def test_composed_configuration_is_left_alone() -> None:
    raw = compose_raw("parallel.dp=fill")
    before = copy.deepcopy(raw)
    load_config(raw, MACHINE)
    assert raw == before


def test_every_key_has_a_default_in_conf_or_came_later() -> None:
    def keys(section: type[Section], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            kind = field.annotation
            nested = isinstance(kind, type) and issubclass(kind, Section)
            found |= keys(kind, f"{prefix}{name}.") if nested else {prefix + name}
        return found

    def leaves(raw: Any, prefix: str = "") -> set[str]:
        of_sections = [leaves(v, f"{prefix}{k}.") for k, v in raw.items() if isinstance(v, dict)]
        return {prefix + k for k, v in raw.items() if not isinstance(v, dict)}.union(*of_sections)

    listed, known = leaves(compose()), keys(RunConfig)
    opaque = ("cluster.peak_flops", "deepspeed")
    assert {key for key in listed if not key.startswith(opaque)} <= known
    assert known - listed <= {*later_keys(), *opaque}


# --- identity


def test_identity_is_stable() -> None:
    config = configure("parallel.partition=[1,3] parallel.pp=2 deepspeed.dump_state=true")
    written = json.loads(config.model_dump_json())
    assert re.fullmatch("[0-9a-f]{8}", identity(config, "data"))
    assert identity(load_config(written, MACHINE), "data") == identity(config, "data")
    assert identity(load_config(dict(reversed(written.items())), MACHINE), "data") == identity(config, "data")
    assert identity(configure("train.learning_rate=1"), "") == identity(configure("train.learning_rate=1.0"), "")


@pytest.mark.parametrize(
    "overrides",
    ["model.initializer_range=0.01", "model=llama_tiny", "parallel.tp=2", "parallel.partition=cost",
     "parallel.zero_stage=1", "parallel.sequence_parallel=true", "model.dropout=0.1", "train.seed=1",
     "train.steps=21", "train.micro_batch_size=2",
     "launch.threads_per_rank=1", "deepspeed.zero_optimization.overlap_comm=true"],
)  # fmt: skip
def test_identity_changes_with_what_is_computed(overrides: str) -> None:
    assert identity(configure(overrides), "data") != identity(configure(), "data")


@pytest.mark.parametrize(
    "overrides",
    ["results_dir=elsewhere", "tracking.wandb.mode=disabled", "tracking.span_steps=0", "sweep.name=other",
     "sweep.points=[x]", "launch.timeout_seconds=5", "launch.master_port=29500", "launch.max_ranks_per_core=1",
     "cluster.name=other", "cluster=h200", "model.name=other", "data.path=moved.txt", "launch.threads_per_rank=2",
     "parallel.dp=1", "model.head_dim=32"],
)  # fmt: skip
def test_identity_ignores_where_and_by_whom(overrides: str) -> None:
    assert identity(configure(overrides), "data") == identity(configure(), "data")


@pytest.mark.parametrize(
    ("overrides", "digits"),
    [("", "07df4ed0"), ("parallel.tp=2", "e6ab54c8"), ("train.keep_checkpoints=5", "07df4ed0"),
     ("model=llama_tiny parallel.pp=2", "2c91bce6")],
)  # fmt: skip
def test_identity_of_points_without_checkpoints_is_what_it_always_was(overrides: str, digits: str) -> None:
    assert identity(configure(overrides), "data") == digits


def test_identity_tells_checkpoints_apart() -> None:
    asked = ["", "train.checkpoint_interval=5", "train.checkpoint_interval=1"]
    asked.append("train.checkpoint_interval=5 train.keep_checkpoints=9")
    assert len({identity(configure(overrides), "data") for overrides in asked}) == len(asked)


def test_identity_follows_the_data() -> None:
    assert identity(configure(), "data") != identity(configure(), "other data")


# --- settings of DeepSpeed


def _recorded_reads() -> set[str]:
    """Top-level keys that the installed DeepSpeed asks its configuration for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Recorder(train_batch_size=1))
    return read


def test_known_keys_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    old_names = {"bfloat16"}
    assert _recorded_reads() - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - old_names == DEEPSPEED_KEYS
    assert {dotted.split(".")[0] for dotted in DEEPSPEED_DERIVED} <= DEEPSPEED_KEYS


def test_known_pipeline_keys_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime import engine
    from deepspeed.runtime.pipe import engine as pipeline_engine
    from deepspeed.runtime.pipe import module

    source = "".join(map(inspect.getsource, (engine, pipeline_engine, module)))
    assert set(re.findall(r"_config\.pipeline(?:\[|\.get\()'(\w+)'", source)) == DEEPSPEED_PIPELINE_KEYS


@pytest.mark.parametrize("dotted", DEEPSPEED_DERIVED)
def test_derived_settings_are_refused_by_name(dotted: str) -> None:
    settings = OmegaConf.to_container(OmegaConf.from_dotlist([f"{dotted}=1"]))
    with pytest.raises(ConfigError, match=rf"deepspeed\.{dotted} is derived by the harness; set "):
        check_deepspeed_settings(cast("dict[str, Any]", settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimiser": {"type": "Adam"}}, "did you mean deepspeed.optimizer?"),
        ({"qqqq": 1}, "deepspeed.qqqq is not a setting DeepSpeed reads; remove it"),
        ({"elasticity": {}}, "deepspeed.elasticity is not a setting DeepSpeed reads"),
        ({"bfloat16": {"enabled": True}}, "did you mean deepspeed.bf16?"),
        ({"pipeline": {"use_reentrent": True}}, "did you mean deepspeed.pipeline.use_reentrant?"),
        ({"data_types": None}, "deepspeed.data_types=None is not a section"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_deepspeed_settings(settings)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["a", "tp-2_pp.4", "2026", "x" * 100])
def test_good_sweep_names(name: str) -> None:
    check_sweep_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "ä", "-", "x" * 101, "a\n", "a\0"])
def test_bad_sweep_names(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a folder name"):
        check_sweep_name(name)
