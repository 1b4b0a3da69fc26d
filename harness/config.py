"""The typed configuration of a run: one class per section, and every check in one place.

Default values live in conf/, the Hydra groups; this module says what a value means, which type it
has and which combinations can run. `load_config` turns what Hydra composed into a `RunConfig`
that never changes afterwards. A mistake raises `ConfigError` with one sentence: what is wrong,
the values, and what to change.

No torch here: the launchers answer in well under a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError

from harness.checkpoints import check_resume, find_checkpoint, fingerprint
from harness.errors import ConfigError
from harness.huggingface import resolve_model
from harness.machine import Machine

REPOSITORY = Path(__file__).resolve().parent.parent

SMALLEST_COMPUTE_CAPABILITY = {"fp16": 7.0, "bf16": 8.0}
"""Of a GPU, by precision: what DeepSpeed asks for, and the first with matrix units for bf16 (Ampere)."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """Shape of the transformer, in the names of `transformers` configurations."""

    name: str
    """Label for tables."""
    family: Literal["gpt2", "llama", "emulated"]
    """gpt2: pre-LayerNorm, learned positions, GELU. llama: RMSNorm, rotary positions, SwiGLU.
    emulated: blocks that wait (`EmulatedModel`)."""
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    """Fewer than num_attention_heads: grouped-query attention."""
    head_dim: PositiveInt
    """Width of one attention head."""
    intermediate_size: PositiveInt
    """Width of the feed-forward layer."""
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool
    """The output head shares the weight of the token embedding."""
    norm_epsilon: PositiveFloat
    rope_theta: PositiveFloat
    """Base of the rotary positions (llama)."""
    initializer_range: PositiveFloat
    """Standard deviation of freshly drawn weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of dropping a value of the embedding, of the attention's probabilities and of what attention
    and feed-forward layer add to the residual stream; one for all, as in GPT-2."""

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of `tp`; the loss never sees the added entries."""
        return -(-self.vocab_size // tp) * tp


class EmulatedModel(Model):
    """A model whose blocks wait for a set time instead of computing; everything around them is real."""

    family: Literal["emulated"]
    forward_seconds: NonNegativeFloat
    """Wait of a block in a forward pass."""
    backward_seconds: NonNegativeFloat
    """Wait of a block in a backward pass."""
    jitter: Annotated[float, Field(ge=0, le=1)]
    """Each wait is longer or shorter by up to this share of it, evenly distributed."""
    stage_factors: list[PositiveFloat] | None
    """What the waits of each stage are multiplied by; null: 1."""


def _of_family(model: Any) -> Any:
    """The section of an emulated model has keys of its own."""
    is_emulated = isinstance(model, Mapping) and model.get("family") == "emulated"
    return EmulatedModel.model_validate(model) if is_emulated else model


class Parallel(Section):
    """The layout: how the model and the batch are split over ranks."""

    tp: PositiveInt
    """Tensor-parallel ranks that share every layer."""
    pp: PositiveInt
    """Pipeline stages."""
    dp: PositiveInt
    """Data-parallel replicas (`fill` in the configuration: devices / (tp x pp))."""
    schedule: Literal["1f1b"]
    """Order of forwards and backwards: DeepSpeed's one-forward-one-backward."""
    partition: Literal["uniform", "parameters", "cost"] | list[PositiveInt]
    """Layers per stage: balanced by number, parameters or FLOPs (head included), or listed."""
    zero_stage: Literal[0, 1, 2, 3]
    """ZeRO optimizer sharding over data-parallel ranks."""
    sequence_parallel: bool
    """Between attention and feed-forward layers each tensor-parallel rank holds 1/tp of the sequence."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp


class Train(Section):
    """What one optimizer step is, and how many are taken."""

    micro_batch_size: PositiveInt
    """Samples in one forward pass."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step over all ranks; the number of micro-batches follows."""
    sequence_length: PositiveInt
    """Tokens of a sample."""
    steps: PositiveInt
    """Optimizer steps."""
    warmup_steps: NonNegativeInt
    """First steps left out of all timings."""
    precision: Literal["fp32", "bf16", "fp16"]
    optimizer: Literal["adamw", "sgd"]
    learning_rate: NonNegativeFloat
    learning_rate_warmup_steps: NonNegativeInt
    """Steps of linear rise to learning_rate."""
    learning_rate_decay: Literal["cosine", "constant"]
    """Course after the rise; cosine ends at a tenth of learning_rate."""
    adam_betas: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)]
    adam_epsilon: PositiveFloat
    weight_decay: NonNegativeFloat
    """Applied to matrices, not to biases and norm weights."""
    gradient_clipping: NonNegativeFloat
    """Largest global gradient norm; 0 clips nothing."""
    activation_checkpointing: Literal["none", "full"]
    """full: a block's activations are computed again in the backward pass."""
    seed: NonNegativeInt
    """Draws weights and samples."""
    checkpoint_interval: NonNegativeInt
    """Steps between checkpoints, the last step has one too; 0 writes none."""
    keep_checkpoints: PositiveInt
    """Newest checkpoints that stay."""
    resume: str | None
    """Checkpoint to go on from, in any layout; a run's directory stands for its newest one."""
    eval_interval: NonNegativeInt
    """Steps between evaluations, the last step has one too; 0 makes none."""
    eval_samples: PositiveInt
    """Held-out samples of an evaluation."""


class Data(Section):
    """Where tokens come from."""

    kind: Literal["text", "synthetic", "hub"]
    """text: local files (default: the English documentation CPython ships); synthetic: random
    tokens; hub: a dataset of the Hugging Face Hub (needs `pip install datasets`)."""
    path: str | None
    """text: file, folder or glob. hub: name of the dataset."""
    tokenizer: str
    """`bytes`, or a folder with a `transformers` tokenizer."""
    hub_split: str
    hub_column: str


class Cluster(Section):
    """The hardware a layout is meant for: datasheet values, empty where not known."""

    name: str
    device_name: str | None
    """The name the device reports, or a part of it that no file of conf/cluster/ has; null: what this machine has. MFU
    uses peak_flops where it fits."""
    num_nodes: PositiveInt
    devices_per_node: PositiveInt | None
    """null: what this machine has."""
    peak_flops: dict[Literal["fp32", "bf16", "fp16"], PositiveFloat | None]
    """Dense matrix FLOP/s of one device, per precision."""
    memory_bytes: PositiveInt | None
    """Memory of one device."""
    intra_node_bytes_per_second: PositiveFloat | None
    """Link bandwidth of one device inside a node, one direction."""
    inter_node_bytes_per_second: PositiveFloat | None
    """Network bandwidth of one device between nodes, one direction."""


class Wandb(Section):
    """Weights & Biases: a mirror of the run directory, never its source."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    timeout_seconds: PositiveFloat
    """Limit for writing one run; a slower one is given up with a warning."""


class Tracking(Section):
    """What is written down about a run."""

    wandb: Wandb
    live: bool
    """wandb follows metrics.jsonl while the run trains, instead of at its end."""
    span_steps: NonNegativeInt
    """Steps after warm-up whose instruction spans are written to spans/."""
    trace_level: Literal["instructions", "collectives"]
    """collectives: spans of tensor-parallel collectives and of recomputation, too."""
    trace_steps: list[PositiveInt]
    """Steps, counted from 1, that trace.json shows."""


class Launch(Section):
    """How processes are started and when they are given up."""

    timeout_seconds: PositiveFloat
    """Wall time of one run, start included."""
    hang_seconds: PositiveFloat
    """Time without progress on any rank, from its first line to its last, where the harness starts `deepspeed`; a
    minute more for the first rank to begin."""
    memory_limit_bytes: PositiveInt | None
    """Private memory of one process (RLIMIT_DATA); null: no limit."""
    threads_per_rank: PositiveInt
    """Compute threads of a rank (`null` in the configuration: cores / ranks)."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None
    """null: a free port per start."""
    max_ranks_per_core: PositiveInt
    """On CPU, more ranks than cores are allowed up to this factor, and marked oversubscribed."""
    slots: PositiveInt
    """Points of a sweep that run at once, on devices (on CPU: cores) of their own, where they fit."""


def _text(name: Any) -> Any:
    """A sweep may be called 2024."""
    return str(name) if type(name) is int else name


class Sweep(Section):
    """A grid of runs under one name."""

    name: Annotated[str, BeforeValidator(_text)]
    """Folder under results_dir."""
    repeats: PositiveInt
    """Measurements of each point, which count as one."""
    points: list[str]
    """Explicit points, each a string of overrides separated by spaces; combined with the swept
    axes of the command line when there are any."""
    retry: list[Literal["oom", "timeout", "hang", "crashed"]]
    """What became of points that are run again; other failures are kept."""
    dry_run: bool
    """Stop before the first point."""
    verify: bool
    """Check the parity of each layout before its first point."""


class CommBench(Section):
    """What launchers/comm_bench.py measures."""

    min_bytes: PositiveInt
    max_bytes: PositiveInt
    """Sizes grow by 4 from min_bytes to max_bytes."""
    repeats: PositiveInt
    """Samples of each size, whose median counts."""


class RunConfig(Section):
    """Everything one run depends on."""

    model: Annotated[SerializeAsAny[Model], BeforeValidator(_of_family)]
    parallel: Parallel
    train: Train
    data: Data
    cluster: Cluster
    tracking: Tracking
    launch: Launch
    sweep: Sweep
    comm_bench: CommBench
    results_dir: str
    deepspeed: dict[str, Any]
    """DeepSpeed settings merged last into ds_config.json; each rank fills in `${oc.env:NAME}` (`harness.secrets`)."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches m per step and data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.dp)

    @property
    def gradient_dtype(self) -> str:
        """Type in which micro-batch gradients add up; without ZeRO DeepSpeed offers only the model's own."""
        return "fp32" if self.train.precision == "bf16" and self.parallel.zero_stage > 0 else self.train.precision

    @property
    def slug(self) -> str:
        """Layout in short, for folder names."""
        p = self.parallel
        return f"tp{p.tp}_pp{p.pp}_dp{p.dp}_mbs{self.train.micro_batch_size}"


def identity(config: RunConfig, data_fingerprint: str) -> str:
    """Eight hex digits that name what is computed and left behind, wherever and by whomever it is started.

    A run that writes checkpoints is another point than one that writes none: it leaves what the other lacks, and
    writing disturbs its steps.

    Args:
        data_fingerprint: hash of the tokens, so that a moved file stays the same data.
    """
    without_checkpoints = {"checkpoint_interval", "keep_checkpoints"} if config.train.checkpoint_interval == 0 else None
    train = config.train.model_dump(exclude=without_checkpoints)
    if config.train.resume is not None:  # a moved checkpoint stays the same, too
        train["resume"] = fingerprint(config.train.resume)
    content = {
        "model": config.model.model_dump(exclude={"name"}),
        "parallel": config.parallel.model_dump(),
        "train": train,
        "data": data_fingerprint,
        "deepspeed": config.deepspeed,
        "threads_per_rank": config.launch.threads_per_rank,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def load_config(raw: Mapping[str, Any], machine: Machine) -> RunConfig:
    """Resolve, type and check what Hydra composed.

    Args:
        raw: plain containers, the composed configuration.
        machine: what the run will find; fills in `dp=fill` and the threads.

    Raises:
        ConfigError: the configuration can't be run.
    """
    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for name in RunConfig.model_fields:
        if name != "results_dir" and not isinstance(raw.get(name), dict):
            raise ConfigError(f"{name}={raw.get(name)!r} is not a section; give it keys, such as {name}.KEY=VALUE")
    raw["model"] = resolve_model(raw["model"])
    if raw.get("results_dir") is None:
        raw["results_dir"] = str(REPOSITORY / "results")
    if isinstance(resume := raw["train"].get("resume"), str):
        raw["train"]["resume"] = str(find_checkpoint(resume))
    _resolve_dp(raw["parallel"], machine)
    _resolve_threads(raw["launch"], raw["parallel"], machine)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None
    check(config, machine)
    return config


def _resolve_dp(parallel: dict[str, Any], machine: Machine) -> None:
    """Replace `fill` by the number of replicas that uses every device."""
    if parallel.get("dp") != "fill":
        return
    tp, pp = parallel.get("tp"), parallel.get("pp")
    if not (isinstance(tp, int) and isinstance(pp, int) and tp >= 1 and pp >= 1):
        parallel["dp"] = 1  # typing reports tp or pp
        return
    if machine.num_devices % (tp * pp):
        raise ConfigError(
            f"parallel.dp=fill can't share {machine.num_devices} devices among tp x pp = {tp * pp} ranks; "
            "choose tp x pp that divides the number of devices, or give parallel.dp a number"
        )
    parallel["dp"] = machine.num_devices // (tp * pp)


def _resolve_threads(launch: dict[str, Any], parallel: dict[str, Any], machine: Machine) -> None:
    """Replace null by cores / (ranks x slots): more threads than cores make ranks wait for each other."""
    if launch.get("threads_per_rank") is not None:
        return
    degrees = [parallel.get(axis) for axis in ("tp", "pp", "dp")]
    world_size = 1
    for degree in degrees:
        world_size *= degree if isinstance(degree, int) and degree >= 1 else 1
    slots = launch.get("slots")
    shares = world_size * (slots if isinstance(slots, int) and slots >= 1 else 1)
    launch["threads_per_rank"] = max(1, machine.num_cores // shares)


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence."""
    # A union reports each alternative: a list was not meant to be one of the words.
    problems = error.errors()
    problem = next(
        (p for p in problems if p["type"] != "literal_error" or not isinstance(p["input"], list)), problems[0]
    )
    location = [str(part) for part in problem["loc"]]
    path = [part for part in location if part.isidentifier() or part.isdigit()]
    key, value = ".".join(path), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a configuration key" + _suggestion(path)
    if problem["type"] == "missing":
        return f"{key} is missing; give it a value"
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}={value!r} is not valid: {expected}"


def _suggestion(path: list[str]) -> str:
    """`; did you mean ...` for a misspelt key, else the keys there are."""
    section: Any = RunConfig
    for part in path[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    names = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(path[-1], names, n=1)
    if close:
        return f"; did you mean {'.'.join([*path[:-1], close[0]])}?"
    return f"; {'.'.join(path[:-1]) or 'the configuration'} has: {', '.join(names)}"


def check(config: RunConfig, machine: Machine) -> None:
    """Refuse what types can't tell: layouts, batches and settings that can't run.

    Raises:
        ConfigError: with what is wrong, the values and the remedy.
    """
    _check_model(config)
    _check_tensor_parallel(config.model, config.parallel)
    _check_pipeline(config.model, config.parallel)
    _check_batch(config)
    _check_training(config, machine)
    _check_tracking(config)
    _check_devices(config, machine)
    if config.comm_bench.min_bytes >= config.comm_bench.max_bytes:
        raise ConfigError(
            f"comm_bench.min_bytes={config.comm_bench.min_bytes} is not below "
            f"comm_bench.max_bytes={config.comm_bench.max_bytes}; a fit needs two sizes or more"
        )
    check_deepspeed_settings(config.deepspeed)
    check_sweep_name(config.sweep.name)
    if config.train.resume is not None:
        check_resume(config.train.resume, config.model.model_dump(), config.train.model_dump())


def _check_model(config: RunConfig) -> None:
    model, train = config.model, config.train
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}; "
            f"use one of {_divisors(model.num_attention_heads)}"
        )
    if model.family == "llama" and model.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={model.head_dim} is odd, but rotary positions turn pairs of values; use an even width"
        )
    if train.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"train.sequence_length={train.sequence_length} exceeds "
            f"model.max_position_embeddings={model.max_position_embeddings}; shorten the one or raise the other"
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
    if parallel.pp > model.num_hidden_layers:
        raise ConfigError(
            f"parallel.pp={parallel.pp} stages exceed model.num_hidden_layers={model.num_hidden_layers}; "
            f"every stage needs a layer: use pp {model.num_hidden_layers} or less"
        )
    if isinstance(parallel.partition, list):
        if len(parallel.partition) != parallel.pp:
            raise ConfigError(
                f"parallel.partition={parallel.partition} names {len(parallel.partition)} stages, "
                f"but parallel.pp={parallel.pp}; give one number of layers per stage"
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
    if parallel.zero_stage >= 2:
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage} can't be combined with DeepSpeed's pipeline engine, "
            "which keeps whole gradients between micro-batches; use zero_stage 0 or 1"
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


def _check_training(config: RunConfig, machine: Machine) -> None:
    train = config.train
    if train.steps <= train.warmup_steps:
        raise ConfigError(
            f"train.steps={train.steps} leaves nothing to time after train.warmup_steps={train.warmup_steps}; "
            f"use steps {train.warmup_steps + 1} or more"
        )
    if max(train.adam_betas) >= 1:
        raise ConfigError(f"train.adam_betas={train.adam_betas} must be below 1; the usual values are [0.9, 0.95]")
    if machine.device_kind == "cpu" and train.precision == "fp16":
        raise ConfigError("train.precision=fp16 is not supported on CPU by DeepSpeed; use fp32 or bf16")
    needed = SMALLEST_COMPUTE_CAPABILITY.get(train.precision, 0.0)
    if machine.compute_capability is not None and machine.compute_capability < needed:
        raise ConfigError(
            f"train.precision={train.precision} needs a GPU of compute capability {needed} or above, but "
            f"{machine.device_name} has {machine.compute_capability}; use fp32"
            + (" or fp16" if machine.compute_capability >= SMALLEST_COMPUTE_CAPABILITY["fp16"] else "")
        )
    if train.precision == "fp16" and config.parallel.zero_stage == 0:
        raise ConfigError(
            "train.precision=fp16 with parallel.zero_stage=0 trains wrongly in DeepSpeed, whose optimizer takes a "
            "step before the first; use parallel.zero_stage=1"
        )


def _check_tracking(config: RunConfig) -> None:
    last = max(config.tracking.trace_steps, default=0)
    if last > config.train.steps:
        raise ConfigError(
            f"tracking.trace_steps={config.tracking.trace_steps} names step {last}, but the run ends with "
            f"train.steps={config.train.steps}; choose earlier steps or raise train.steps"
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


# Top-level keys DeepSpeed reads; it ignores any other in silence, so a misspelt one is refused, and so are
# those it has removed (it stops on them) and `bfloat16`, its old name of bf16.
DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization""".split()
)
DEEPSPEED_PIPELINE_KEYS = frozenset(
    "use_reentrant activation_checkpoint_interval pipe_partitioned grad_partitioned".split()
)

# Keys the harness derives: dotted name -> what to set instead.
DEEPSPEED_DERIVED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.optimizer",
    "scheduler": "train.learning_rate_decay",
    "steps_per_print": "nothing: each step is a line of metrics.jsonl",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.grad_accum_dtype": "train.precision",
    "data_types.param_dtype": "train.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "tensor_parallel": "parallel.tp",
    "expert_parallel": "nothing: the models have no experts",
    "managed_gradient_accumulation": "nothing: the pipeline engine accumulates",
    "gradient_allreduce_op": "nothing: the gradients of replicas are averaged",
    "pipeline.pipe_partitioned": "parallel.sequence_parallel, with which slices of activations cross stages",
    "pipeline.grad_partitioned": "parallel.sequence_parallel, with which slices of gradients cross stages",
    "pipeline.activation_checkpoint_interval": "train.activation_checkpointing",
    "activation_checkpointing": "train.activation_checkpointing",
    "wall_clock_breakdown": "nothing: spans/ holds every instruction",
    "wandb": "tracking.wandb",
}


def check_deepspeed_settings(settings: Mapping[str, Any]) -> None:
    """Refuse `deepspeed.*` keys that the harness derives or DeepSpeed does not know.

    Raises:
        ConfigError: with the key and what to set instead.
    """
    sections = {dotted.split(".")[0] for dotted in DEEPSPEED_DERIVED if "." in dotted}
    for key, value in settings.items():
        children = list(value) if isinstance(value, Mapping) else []
        for dotted in (key, *(f"{key}.{child}" for child in children)):
            if dotted in DEEPSPEED_DERIVED:
                raise ConfigError(f"deepspeed.{dotted} is derived by the harness; set {DEEPSPEED_DERIVED[dotted]}")
        _check_known("deepspeed", [key], DEEPSPEED_KEYS)
        if key in sections and not isinstance(value, Mapping):
            raise ConfigError(f"deepspeed.{key}={value!r} is not a section; give it keys, such as deepspeed.{key}.KEY")
        if key == "pipeline":
            _check_known("deepspeed.pipeline", children, DEEPSPEED_PIPELINE_KEYS)


def _check_known(section: str, keys: list[str], known: frozenset[str]) -> None:
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {section}.{close[0]}?" if close else "remove it"
            raise ConfigError(f"{section}.{key} is not a setting DeepSpeed reads; {remedy}")


RESERVED_NAMES = frozenset({"runs", "verify", "comm_bench", "published"})
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


def _or(values: list[int]) -> str:
    """`1, 2 or 4`."""
    *head, last = [str(value) for value in values]
    return f"{', '.join(head)} or {last}" if head else last
