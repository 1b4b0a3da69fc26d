"""Which combinations of values can run: every check that types can't make, each with its sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.checkpoints import check_resume
from harness.errors import ConfigError
from harness.machine import Machine
from harness.spec.config import EmulatedModel, Model, Parallel, RunConfig
from harness.spec.deepspeed_keys import check_deepspeed_settings
from harness.spec.engines import engine_kind
from harness.spec.families import FAMILIES
from harness.spec.generation import check_forward, check_generation, gives_prompts
from harness.spec.initial_weights import check_weights, weights_fingerprint
from harness.spec.kv_cache import kv_cache_bytes, longest_sequence
from harness.spec.precision import PRECISIONS
from harness.spec.schedules import SCHEDULES, check_file, check_sizes, kind_of
from harness.spec.versions import later_in


def check(config: RunConfig, machine: Machine) -> None:
    """Refuse what types can't tell: layouts, batches and settings that can't run.

    Raises:
        ConfigError: with what is wrong, the values and the remedy.
    """
    _check_model(config)
    _check_tensor_parallel(config.model, config.parallel)
    _check_schedule(config)
    _check_pipeline(config.model, config.parallel)
    _check_precision(config, machine)
    _check_devices(config, machine)
    if config.task == "generate":
        check_generation(config)
        _check_cache(config, machine)
    else:
        _check_batch(config)
        _check_steps(config)
    if config.task == "train":
        _check_training(config, machine)
    elif config.generate.quantization == "int8" and machine.device_kind == "cuda":
        raise ConfigError("generate.quantization=int8 is for CPUs, and ranks here use GPUs; use none")
    if config.task == "forward":
        check_forward(config)
    if config.model.part != "model" and config.task != "forward":
        raise ConfigError(
            f"model.part={config.model.part} is measured in forward passes alone; use task=forward, or model.part=model"
        )
    if config.comm_bench.min_bytes >= config.comm_bench.max_bytes:
        raise ConfigError(
            f"comm_bench.min_bytes={config.comm_bench.min_bytes} is not below "
            f"comm_bench.max_bytes={config.comm_bench.max_bytes}; a fit needs two sizes or more"
        )
    check_deepspeed_settings(config.deepspeed)
    check_sweep_name(config.sweep.name)
    weights = config.model.weights
    if weights is not None:
        check_weights(config.model)
    if config.train.resume is not None:
        began_from = None if weights is None else weights_fingerprint(weights)
        model, train = config.model.model_dump(), config.train.model_dump()
        check_resume(config.train.resume, model, train, later_in(config.model), began_from)


def _check_model(config: RunConfig) -> None:
    model, train = config.model, config.train
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}; "
            f"use one of {_divisors(model.num_attention_heads)}"
        )
    if model.architecture.causal and train.objective == "masked":
        both = _or([name for name, family in FAMILIES.items() if not family.causal])
        raise ConfigError(
            f"train.objective=masked needs a family that sees both directions, not model.family={model.family}; use "
            f"train.objective=causal, or {both}"
        )
    if model.sliding_window is not None and not model.causal:
        raise ConfigError(
            f"model.sliding_window={model.sliding_window} is for tokens that look back, not for train.objective="
            f"{train.objective}; use model.sliding_window=null"
        )
    scaling = model.rope_scaling
    if scaling is not None and model.architecture.positions != "rotary":
        raise ConfigError(
            f"model.rope_scaling is for rotary positions, which model.family={model.family} has none of; leave it out"
        )
    if model.architecture.positions == "rotary" and model.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={model.head_dim} is odd, but rotary positions turn pairs of values; use an even width"
        )
    if config.task != "generate" and train.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"train.sequence_length={train.sequence_length} exceeds "
            f"model.max_position_embeddings={model.max_position_embeddings}; shorten the one or raise the other"
        )
    if model.compile and not model.architecture.computes:
        raise ConfigError(
            f"model.compile=true has nothing to compile in model.family={model.family}, whose blocks wait; use "
            "model.compile=false"
        )
    if model.onednn and (train.precision != "fp32" or not model.architecture.computes):
        raise ConfigError(
            f"model.onednn=true is for fp32 products, not for train.precision={train.precision} of model.family="
            f"{model.family}; use model.onednn=null"
        )
    tp = config.parallel.tp
    if config.parallel.sequence_parallel and train.sequence_length % tp:
        raise ConfigError(
            f"train.sequence_length={train.sequence_length} can't be sliced for parallel.sequence_parallel=true over "
            f"parallel.tp={tp}; use a multiple of {tp}, or parallel.sequence_parallel=false"
        )


def _check_tensor_parallel(model: Model, parallel: Parallel) -> None:
    tp = parallel.tp
    for key in ("num_attention_heads", "intermediate_size"):
        size = getattr(model, key)
        if size % tp:
            raise ConfigError(
                f"model.{key}={size} can't be split over parallel.tp={tp}; use tp {_or(_divisors(size, 64))}"
            )
    heads = model.num_key_value_heads
    if heads % tp == 0:
        return
    if tp % heads:
        fits = [d for d in _divisors(model.num_attention_heads, 64) if heads % d == 0 or d % heads == 0]
        raise ConfigError(
            f"model.num_key_value_heads={heads} can neither be split over parallel.tp={tp} nor shared "
            f"evenly by its ranks; use tp {_or(fits)}"
        )
    if model.head_dim % (tp // heads):
        raise ConfigError(
            f"model.head_dim={model.head_dim} can't be split over the {tp // heads} ranks of parallel.tp={tp} "
            f"that share a key-value head; use tp {_or(_divisors(heads, 64))}"
        )


def _check_pipeline(model: Model, parallel: Parallel) -> None:
    num_chunks = parallel.num_chunks
    num_parts, each = parallel.pp * num_chunks, f" x parallel.num_chunks={num_chunks}" if num_chunks > 1 else ""
    noun = "parts" if each else "stages"
    if num_parts > model.num_hidden_layers:
        raise ConfigError(
            f"parallel.pp={parallel.pp}{each} {noun} exceed model.num_hidden_layers={model.num_hidden_layers}; "
            f"every {noun[:-1]} needs a layer: use pp{' x num_chunks' * bool(each)} {model.num_hidden_layers} or less"
        )
    if isinstance(parallel.partition, list):
        if len(parallel.partition) != num_parts:
            raise ConfigError(
                f"parallel.partition={parallel.partition} names {len(parallel.partition)} {noun}, "
                f"but parallel.pp={parallel.pp}{each}; give one number of layers per {noun[:-1]}"
            )
        if sum(parallel.partition) != model.num_hidden_layers:
            raise ConfigError(
                f"parallel.partition={parallel.partition} places {sum(parallel.partition)} layers, "
                f"but model.num_hidden_layers={model.num_hidden_layers}; make them equal"
            )
    factors = model.stage_factors if isinstance(model, EmulatedModel) else None
    if factors is not None and len(factors) != parallel.pp:
        raise ConfigError(
            f"model.stage_factors={factors} names {len(factors)} stages, "
            f"but parallel.pp={parallel.pp}; give one factor per stage"
        )


def _check_batch(config: RunConfig) -> None:
    train, parallel = config.train, config.parallel
    share = train.micro_batch_size * parallel.dp
    if train.global_batch_size % share:
        fits = [d for d in _divisors(train.global_batch_size) if train.global_batch_size % (d * parallel.dp) == 0]
        remedy = f"micro_batch_size {_or(fits)}" if fits else f"a dp that divides {train.global_batch_size}"
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size} x parallel.dp={parallel.dp}; use {remedy}"
        )


def _check_schedule(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.schedule_passes is None and parallel.schedule not in SCHEDULES:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} is not available; use {_or([*SCHEDULES, 'a file, NAME.csv'])}"
        )
    sizes = parallel.pp, config.num_micro_batches, parallel.num_chunks, parallel.schedule_memory
    try:
        if parallel.schedule_passes is None:
            check_sizes(parallel.schedule, *sizes)
        else:
            check_file(config)
    except ValueError as error:
        raise ConfigError(f"parallel.schedule={parallel.schedule}: {error}") from None
    rows, num_parts = parallel.schedule_seconds, parallel.pp * parallel.num_chunks
    if rows is not None and len(rows) not in (1, num_parts):
        raise ConfigError(
            f"parallel.schedule_seconds has {len(rows)} rows for {num_parts} parts of the model; give one row for all "
            "or one for each part"
        )
    if rows is not None and not any(map(any, rows)):
        raise ConfigError(f"parallel.schedule_seconds={rows} are all 0; give passes the seconds or ratios they take")
    if rows is not None and (parallel.schedule_passes is not None or not SCHEDULES[parallel.schedule].limits_memory):
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} counts with no parallel.schedule_seconds; leave them out, or use "
            f"{_or([name for name, kind in SCHEDULES.items() if kind.limits_memory])}"
        )
    if kind_of(parallel).splits and not engine_kind(parallel.engine).splits_backward:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} splits backward passes, which parallel.engine={parallel.engine} "
            "can't; use another schedule or engine"
        )


def _check_cache(config: RunConfig, machine: Machine) -> None:
    """Of random prompts, whose lengths are known; what lies beside it in memory is not counted."""
    if gives_prompts(config):
        return
    settings, tp = config.generate, config.parallel.tp
    count = min(settings.batch_size, settings.num_requests or settings.batch_size)
    stages = kv_cache_bytes(config, count, longest_sequence(config, [settings.prompt_length]))
    needed = sum(stages) * tp if machine.device_kind == "cpu" else max(stages)
    if needed > machine.memory_bytes:
        where = "this machine" if machine.device_kind == "cpu" else machine.device_name
        raise ConfigError(
            f"the keys and values of generate.batch_size={count} sequences take {needed / 2**30:,.1f} GiB, and {where} "
            f"has {machine.memory_bytes / 2**30:,.1f}; use a smaller batch, or shorter sequences"
        )


def _check_steps(config: RunConfig) -> None:
    train = config.train
    last = max(config.tracking.trace_steps, default=0)
    if last > train.steps:
        raise ConfigError(
            f"tracking.trace_steps={config.tracking.trace_steps} names step {last}, but the run ends with "
            f"train.steps={train.steps}; choose earlier steps or raise train.steps"
        )
    if train.steps <= train.warmup_steps:
        raise ConfigError(
            f"train.steps={train.steps} leaves nothing to time after train.warmup_steps={train.warmup_steps}; "
            f"use steps {train.warmup_steps + 1} or more"
        )


def _check_training(config: RunConfig, machine: Machine) -> None:
    train = config.train
    if max(train.adam_betas) >= 1:
        raise ConfigError(f"train.adam_betas={train.adam_betas} must be below 1; the usual values are [0.9, 0.95]")
    if machine.device_kind == "cpu" and train.precision == "fp16":
        raise ConfigError("train.precision=fp16 is not supported on CPU by DeepSpeed; use fp32 or bf16")
    engine_kind(config.parallel.engine).check(config)


def _check_precision(config: RunConfig, machine: Machine) -> None:
    train = config.train
    needed, found = PRECISIONS[train.precision].smallest_compute_capability, machine.compute_capability
    if found is not None and found < needed:
        fits = [name for name, other in PRECISIONS.items() if other.smallest_compute_capability <= found]
        raise ConfigError(
            f"train.precision={train.precision} needs a GPU of compute capability {needed} or above, but "
            f"{machine.device_name} has {found}; use {_or(fits)}"
        )


def _check_devices(config: RunConfig, machine: Machine) -> None:
    world_size, parallel = config.parallel.world_size, config.parallel
    layout = f"tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp} needs {world_size} ranks"
    if machine.device_kind == "cuda":
        if world_size > machine.num_devices:
            raise ConfigError(f"{layout}, but there are {machine.num_devices} GPUs; use a layout that fits them")
        return
    limit = config.launch.max_ranks_per_core * machine.num_cores
    if world_size > limit:
        raise ConfigError(
            f"{layout}, but {machine.num_cores} cores hold at most {limit} "
            f"(launch.max_ranks_per_core={config.launch.max_ranks_per_core}); use a smaller layout"
        )


RESERVED_NAMES = frozenset({"runs", "verify", "comm_bench", "probe", "generated", "published"})
"""Folders under results_dir that are no sweeps."""


def check_sweep_name(name: Any) -> None:
    """A sweep's name is one folder: letters, digits, `.`, `_` and `-`.

    Raises:
        ConfigError: for anything else, and for a name that is in use for something else.
    """
    if name in RESERVED_NAMES:
        raise ConfigError(f"sweep.name={name} is the folder of something else than a sweep; choose another name")
    if not isinstance(name, str):
        raise ConfigError(f"sweep.name={name!r} is not a text; quote it twice: sweep.name=\"'{name}'\"")
    allowed = name.replace("-", "").replace("_", "").replace(".", "")
    if not (allowed.isascii() and allowed.isalnum()) or name.startswith(".") or len(name) > 100:
        raise ConfigError(
            f"sweep.name={name!r} is not a folder name; use up to 100 letters, digits, '.', '_' and '-', "
            "not beginning with '.'"
        )


def _divisors(number: int, limit: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, limit or number) + 1) if number % d == 0]


def _or(values: Sequence[object]) -> str:
    """`1, 2 or 4`."""
    *head, last = [str(value) for value in values]
    return f"{', '.join(head)} or {last}" if head else last
