"""The typed configuration of a run: one class per section, and every check in one place.

Default values live in conf/, the Hydra groups; this module says what a value means, which type it
has and which combinations can run. A key that comes later has a default here, too: the value under
which runs are as they were before it came (`harness.spec.versions`). Such a field with its docstring
is all a key needs; conf/ lists it where readers look for it or new runs are to have another value.

`load_config` turns what Hydra composed into a `RunConfig` that never changes afterwards. A mistake
raises `ConfigError` with one sentence: what is wrong, the values, and what to change.

No torch here: the launchers answer in well under a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticKnownError

from harness.spec.architecture import Architecture
from harness.spec.families import FAMILIES
from harness.spec.precision import PrecisionName
from harness.spec.topology import Topology

REPOSITORY = Path(__file__).resolve().parent.parent.parent

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class RopeScaling(Section):
    """Rotary positions for longer sequences than a model was first trained on, as Llama 3.1 has them (`rope_type:
    llama3` in `transformers`): pairs that turn slowly turn slower still, by `factor`, fast ones as before, and those
    between by a share of both."""

    factor: Annotated[float, Field(ge=1)]
    """How much slower."""
    low_freq_factor: PositiveFloat
    """Pairs with fewer turns than this in original_max_position_embeddings are slow."""
    high_freq_factor: PositiveFloat
    """Pairs with more turns than this in original_max_position_embeddings are fast."""
    original_max_position_embeddings: PositiveInt
    """Longest sequence before."""

    @model_validator(mode="after")
    def _is_between(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor:g} is not above low_freq_factor={self.low_freq_factor:g}; "
                "Llama 3.1 has 4 and 1"
            )
        return self


def _known_family(name: Any) -> Any:
    """One of the table, also one that was added to it later."""
    if not isinstance(name, str) or name not in FAMILIES:
        *most, last = map(repr, FAMILIES)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"})
    return name


class Model(Section):
    """Shape of the transformer, in the names of `transformers` configurations."""

    name: str
    """Label for tables."""
    family: Annotated[
        str,
        BeforeValidator(_known_family),
        Field(description="; ".join(f"{name}: {family.summary}" for name, family in FAMILIES.items())),
    ]
    num_hidden_layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads of a block."""
    num_key_value_heads: PositiveInt
    """Fewer than num_attention_heads: grouped-query attention (`null` in the configuration: as many)."""
    head_dim: PositiveInt
    """Width of one attention head (`null` in the configuration: hidden_size / num_attention_heads)."""
    intermediate_size: PositiveInt
    """Width of the feed-forward layer (`null` in the configuration: 4 x hidden_size)."""
    vocab_size: PositiveInt
    """Different tokens."""
    max_position_embeddings: PositiveInt
    """Longest sequence the model is made for."""
    tie_word_embeddings: bool
    """The output head shares the weight of the token embedding."""
    norm_epsilon: PositiveFloat
    """Added to the variance in normalization layers."""
    rope_theta: PositiveFloat
    """Base of rotary positions; no meaning to a family without them."""
    initializer_range: PositiveFloat
    """Standard deviation of freshly drawn weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of dropping a value of the embedding, of the attention's probabilities and of what attention
    and feed-forward layer add to the residual stream; one for all, as in GPT-2."""
    compile: bool = False
    """Blocks train through torch.compile, which happens once, before the first step (`compile_seconds`); where it
    fails, a rank computes without, and its row says why."""
    onednn: bool | None = None
    """fp32 products on CPUs go through oneDNN; null: those that it is faster for than torch's usual library, which are
    the larger ones on AMD processors with AVX-512."""
    causal: bool = True
    """A token sees itself and those before it, no later ones; filled in from train.objective."""
    sliding_window: PositiveInt | None = None
    """A token sees this many at most, itself among them; null: all before it."""
    rope_scaling: RopeScaling | None = None
    """Rotary positions of Llama 3.1; null: plain ones."""
    type_vocab_size: NonNegativeInt = 0
    """Kinds of tokens with an embedding each, added to that of the token; every token is of the first. 0: none."""
    weights: str | None = None
    """Checkpoint or `save_pretrained` folder to begin from, whose shape takes the place of the chosen one; a run's
    directory stands for its newest checkpoint. null: fresh weights."""

    part: Literal["model", "layer"] = "model"
    """What is run: all of it, or, with task=forward, one transformer layer alone."""

    @property
    def architecture(self) -> Architecture:
        """What its family is."""
        return FAMILIES[self.family]

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of `tp`; the loss never sees the added entries."""
        return -(-self.vocab_size // tp) * tp


class EmulatedModel(Model):
    """A model whose blocks wait for a set time instead of computing; everything around them is real."""

    forward_seconds: NonNegativeFloat
    """Wait of a block in a forward pass of a micro-batch without padding; with padding, of the share that is none."""
    backward_seconds: NonNegativeFloat
    """Wait of a block in a backward pass, likewise."""
    jitter: Annotated[float, Field(ge=0, le=1)]
    """Each wait is longer or shorter by up to this share of it, evenly distributed."""
    stage_factors: list[PositiveFloat] | None
    """What the waits of each stage are multiplied by; null: 1."""


def _of_family(model: Any) -> Any:
    """The section of a family whose blocks wait has keys of its own."""
    name = model.get("family") if isinstance(model, Mapping) else None
    architecture = FAMILIES.get(name) if isinstance(name, str) else None
    return model if architecture is None or architecture.computes else EmulatedModel.model_validate(model)


AnyModel = Annotated[SerializeAsAny[Model], BeforeValidator(_of_family)]
"""The section of any family."""


class Parallel(Section):
    """The layout: how the model and the batch are split over ranks."""

    tp: PositiveInt
    """Tensor-parallel ranks that share every layer."""
    pp: PositiveInt
    """Pipeline stages."""
    dp: PositiveInt
    """Data-parallel replicas (`fill` in the configuration: devices / (tp x pp))."""
    schedule: str
    """Order of forwards and backwards, an entry of `harness.spec.schedules`; or a file, FILE.csv."""
    partition: Literal["uniform", "parameters", "cost"] | list[PositiveInt]
    """Layers per stage: balanced by number, parameters or FLOPs (head included), or listed. Where stages have several
    chunks, layers per part, in the order of the model. `measured` in the configuration: balanced by the seconds that
    layers take on this machine."""
    zero_stage: Literal[0, 1, 2, 3]
    """ZeRO optimizer sharding over data-parallel ranks."""
    sequence_parallel: bool
    """Between attention and feed-forward layers each tensor-parallel rank holds 1/tp of the sequence."""
    engine: str = "deepspeed"
    """What trains, an entry of `harness.spec.engines`. Others are torch's own, in fp32, to compare with:
    torch: plain torch on one rank, or torch.distributed.pipelining's schedules; dtensor: a model that is split by
    parallelize_module; ddp: DistributedDataParallel."""
    num_chunks: PositiveInt = 1
    """Parts of the model on each stage (`null` in the configuration: 1, or 2 with interleaved, zb_v and dualpipev)."""
    schedule_memory: PositiveFloat | None = None
    """Activations that a stage may hold with zb_auto and zb_v, in multiples of those of 1F1B's first stage; null: as
    many as it. A schedule from a file that holds more is refused; null: it may hold any."""
    schedule_seconds: list[Annotated[list[NonNegativeFloat], Field(min_length=3, max_length=3)]] | None = None
    """What zb_auto and zb_v count with: seconds of a forward pass and of the input and weight halves of a backward
    pass, for each part of the model, or one for all; only their ratios matter. null: all take equally long; `measured`
    in the configuration: what the layers take on this machine."""
    shared_memory: bool = True
    """Without GPUs, ranks of one host talk through memory that they share; false: through gloo, as ranks of several
    hosts do, and those of torch's own engines."""
    schedule_passes: list[str] | None = None
    """What parallel.schedule=FILE.csv holds, a line per stage; filled in from the file."""

    @property
    def topology(self) -> Topology:
        """Which rank is which."""
        return Topology(pp=self.pp, dp=self.dp, tp=self.tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    @property
    def num_slices(self) -> int:
        """Ranks over which what is between attention and feed-forward layers is sliced."""
        return self.tp if self.sequence_parallel else 1


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
    precision: PrecisionName
    """Type of weights and activations in forward and backward; the optimizer steps in fp32."""
    optimizer: Literal["adamw", "sgd"]
    """adamw: Adam with decoupled weight decay. sgd: without momentum."""
    learning_rate: NonNegativeFloat
    """Its largest value."""
    learning_rate_warmup_steps: NonNegativeInt
    """Steps of linear rise to learning_rate."""
    learning_rate_decay: Literal["cosine", "constant"]
    """Course after the rise; cosine ends at a tenth of learning_rate."""
    adam_betas: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)]
    """Decay of the running means of the gradient and of its square."""
    adam_epsilon: PositiveFloat
    """Added to the denominator of Adam's update."""
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
    objective: Literal["causal", "masked"] = "causal"
    """causal: predict the next token. masked: predict tokens that were masked (arXiv 1810.04805), for families that
    see both directions. `null` in the configuration: what the family is made for."""


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
    """Split of the dataset."""
    hub_column: str
    """Column of the dataset that holds the text."""
    documents: Literal["cut", "padded", "packed"] = "cut"
    """cut: samples are windows of all documents in a row. padded: a sample is a document, filled up with padding.
    packed: a sample is several documents that don't see each other, and what is left is padding."""


class Cluster(Section):
    """The hardware a layout is meant for: datasheet values, empty where not known.

    A run reads device_name and peak_flops, for its MFU. The others are for predictions of layouts; no run reads them.
    """

    name: str
    """Label of the cluster; for predictions, no run reads it."""
    device_name: str | None
    """The name the device reports, or a part of it that no file of conf/cluster/ has; null: what this machine has. MFU
    uses peak_flops where it fits."""
    num_nodes: PositiveInt
    """Nodes; for predictions, no run reads it."""
    devices_per_node: PositiveInt | None
    """null: what this machine has; for predictions, no run reads it."""
    peak_flops: dict[PrecisionName, PositiveFloat | None]
    """Dense matrix FLOP/s of one device, per precision."""
    memory_bytes: PositiveInt | None
    """Memory of one device; for predictions, no run reads it."""
    intra_node_bytes_per_second: PositiveFloat | None
    """Link bandwidth of one device inside a node, one direction; for predictions, no run reads it."""
    inter_node_bytes_per_second: PositiveFloat | None
    """Network bandwidth of one device between nodes, one direction; for predictions, no run reads it."""


class Wandb(Section):
    """Weights & Biases: a mirror of the run directory, never its source."""

    mode: Literal["offline", "online", "disabled"]
    """offline: files that `wandb sync` uploads; online: at once; disabled: nothing."""
    project: str
    """Project of the runs."""
    entity: str | None
    """User or team that owns them; null: the default of the key."""
    timeout_seconds: PositiveFloat
    """Limit for writing one run; a slower one is given up with a warning."""


class Tracking(Section):
    """What is written down about a run."""

    wandb: Wandb
    """The mirror of each run."""
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

    backend: str = "local"
    """Where they are started, one of the table in harness/launch/backends. local: on this host, by `deepspeed`."""
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
    """Smallest size of an operation."""
    max_bytes: PositiveInt
    """Largest size; they grow by 4 from min_bytes on."""
    repeats: PositiveInt
    """Samples of each size, whose median counts."""


class Generate(Section):
    """What is generated, from what, and how many sequences at a time."""

    prompt: str | None = None
    """Text to go on from."""
    prompts_file: str | None = None
    """File with a prompt per line; one that ends in .jsonl: objects with `prompt`, or with `prompt_tokens`, a list."""
    output: str | None = None
    """File for what was generated, an object per line in the order of the prompts."""
    max_new_tokens: PositiveInt = 64
    """Tokens after which a sequence ends, if nothing ends it before."""
    temperature: NonNegativeFloat = 0.0
    """What scores are divided by before a token is drawn; 0: the token of the highest score."""
    top_k: NonNegativeInt = 0
    """Only so many tokens of the highest scores are drawn from; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the fewest tokens whose probabilities make up this are drawn from (arXiv 1904.09751)."""
    repetition_penalty: PositiveFloat = 1.0
    """Scores of tokens that the sequence has are divided by this where they are positive, else multiplied
    (arXiv 1909.05858)."""
    stop_tokens: list[NonNegativeInt] | None = None
    """Tokens that end a sequence; null: those that the model's folder or its tokenizer names."""
    stop_strings: list[str] = Field(default_factory=list)
    """Texts that end a sequence, which keeps what is before them."""
    ignore_stop: bool = False
    """Go on to max_new_tokens, whatever comes: for measuring."""
    seed: NonNegativeInt = 1234
    """Draws tokens, prompts where none are given, and the moments of requests."""
    batch_size: PositiveInt = 8
    """Sequences that are worked on at a time, each with a place in the cache of keys and values."""
    prompt_length: PositiveInt = 64
    """Tokens of each prompt where none are given: random ones, to measure."""
    num_groups: PositiveInt | None = None
    """Groups of sequences that go round the stages one after the other, so that all stages work; null: one per stage.
    """
    num_requests: PositiveInt | None = None
    """Random prompts; null: batch_size."""
    prefill_chunk: PositiveInt | None = None
    """Tokens of a prompt that a pass takes at most; null: all."""
    prefill_batch_size: PositiveInt | None = None
    """Prompts that a pass takes at most; null: all of a group."""
    block_size: PositiveInt = 16
    """Positions by which the place of a sequence in the cache grows."""
    request_rate: PositiveFloat | None = None
    """Requests per second, offered at random moments (a Poisson process); null: all at once."""
    quantization: Literal["none", "int8"] = "none"
    """int8: weights of matrix products are rounded to 8 bits, one scale per output, activations as they come."""
    repeats: PositiveInt = 3
    """Measurements of a run, of which the medians count; one more before them doesn't."""
    perplexity_samples: NonNegativeInt | None = None
    """Held-out samples of `data` that perplexity is measured on, as configured and in fp32 without quantization; null:
    8 where quantization or precision round weights that were given, else 0."""


class RunConfig(Section):
    """Everything one run depends on."""

    model: AnyModel
    parallel: Parallel
    train: Train
    data: Data
    cluster: Cluster
    tracking: Tracking
    launch: Launch
    sweep: Sweep
    comm_bench: CommBench
    task: Literal["train", "generate", "forward"] = "train"
    """What is run. forward: forward passes alone, of samples as in training."""
    generate: Generate = Field(default_factory=Generate)
    results_dir: str
    """Folder of all sweeps and runs (`null` in the configuration: results/ of the repository)."""
    deepspeed: dict[str, Any]
    """DeepSpeed settings merged last into ds_config.json; each rank fills in `${oc.env:NAME}` (`harness.secrets`)."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches m per step and data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.dp)

    @property
    def masks_documents(self) -> bool:
        """Whether a token would see what is not of its document, but for a mask: padding is behind the others."""
        return self.data.documents == "packed" or (self.data.documents == "padded" and not self.model.causal)

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """Of what passes between layers: [batch, slice, hidden]."""
        train = self.train
        return train.micro_batch_size, train.sequence_length // self.parallel.num_slices, self.model.hidden_size

    @property
    def gradient_dtype(self) -> PrecisionName:
        """Type in which micro-batch gradients add up; without ZeRO DeepSpeed offers only the model's own."""
        return "fp32" if self.train.precision == "bf16" and self.parallel.zero_stage > 0 else self.train.precision

    @property
    def slug(self) -> str:
        """Layout in short, for folder names."""
        p = self.parallel
        return f"tp{p.tp}_pp{p.pp}_dp{p.dp}_mbs{self.train.micro_batch_size}"
