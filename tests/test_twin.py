"""The small model of a parity check keeps whatever changes the computation, and only sizes shrink."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import compose_raw
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.machine import Machine
from harness.spec.checks import check
from harness.spec.config import EmulatedModel, Generate, Model, Parallel, RunConfig, Train
from harness.spec.kv_cache import num_groups
from harness.spec.resolve import load_config
from harness.spec.twin import reductions, twin_of

GPUS = Machine("cuda", "test GPU", num_devices=2**10, num_cores=2**10, memory_bytes=2**40)
LLAMA, GPT2 = (load_config(compose_raw(f"model={name}"), GPUS) for name in ("llama_tiny", "gpt2_tiny"))

# What may become of every field. "size": smaller, as the test below says for each; "off": where tp > 1, see the
# docstring of twin_of.
SIZE, KEPT, OFF = "size", "kept", "off"
FIELDS = {
    "model": {
        "name": KEPT, "family": KEPT, "num_hidden_layers": SIZE, "hidden_size": SIZE, "num_attention_heads": SIZE,
        "num_key_value_heads": SIZE, "head_dim": SIZE, "intermediate_size": SIZE, "vocab_size": SIZE,
        "max_position_embeddings": KEPT, "tie_word_embeddings": KEPT, "norm_epsilon": KEPT, "rope_theta": KEPT,
        "initializer_range": KEPT, "dropout": OFF, "compile": KEPT, "onednn": KEPT,
        "causal": KEPT, "sliding_window": SIZE, "rope_scaling": KEPT, "type_vocab_size": KEPT, "weights": OFF,
        "part": KEPT,
    },
    "parallel": {
        "tp": KEPT, "pp": KEPT, "dp": KEPT, "schedule": KEPT, "partition": SIZE, "zero_stage": KEPT,
        "sequence_parallel": KEPT, "engine": KEPT, "num_chunks": KEPT,
        "schedule_memory": KEPT, "schedule_passes": KEPT, "schedule_seconds": KEPT, "shared_memory": KEPT,
    },
    "train": {
        "micro_batch_size": SIZE, "global_batch_size": SIZE, "sequence_length": SIZE, "steps": KEPT,
        "warmup_steps": KEPT, "precision": KEPT, "optimizer": KEPT, "learning_rate": KEPT,
        "learning_rate_warmup_steps": KEPT, "learning_rate_decay": KEPT, "adam_betas": KEPT, "adam_epsilon": KEPT,
        "weight_decay": KEPT, "gradient_clipping": KEPT, "activation_checkpointing": KEPT, "seed": KEPT,
        "checkpoint_interval": KEPT, "keep_checkpoints": KEPT, "resume": KEPT, "eval_interval": KEPT,
        "eval_samples": KEPT, "objective": KEPT,
    },
    "generate": {
        "prompt": OFF, "prompts_file": OFF, "output": OFF, "max_new_tokens": SIZE, "temperature": KEPT, "top_k": SIZE,
        "top_p": KEPT, "repetition_penalty": KEPT, "stop_tokens": OFF, "stop_strings": OFF, "ignore_stop": OFF,
        "seed": KEPT, "batch_size": SIZE, "prompt_length": SIZE, "num_groups": KEPT, "num_requests": SIZE,
        "prefill_chunk": SIZE, "prefill_batch_size": SIZE, "block_size": SIZE, "request_rate": OFF,
        "quantization": OFF, "repeats": KEPT, "perplexity_samples": KEPT,
    },
}  # fmt: skip
SECTIONS = {"model": Model, "parallel": Parallel, "train": Train, "generate": Generate}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_decided_upon(section: str) -> None:
    """A new one needs a decision: does the twin keep it, or is it a size?"""
    assert set(SECTIONS[section].model_fields) == set(FIELDS[section])


def test_sections_beside_are_kept_whole() -> None:
    twin = twin_of(LLAMA)
    for section in set(RunConfig.model_fields) - set(SECTIONS):
        assert getattr(twin, section) == getattr(LLAMA, section), section
    assert set(EmulatedModel.model_fields) - set(Model.model_fields) == {
        "forward_seconds", "backward_seconds", "jitter", "stage_factors"
    }  # fmt: skip


# What is kept and bound to nothing else may have any value.
FREE = {
    "model": ["tie_word_embeddings", "norm_epsilon", "rope_theta", "initializer_range", "dropout"],
    "train": [
        "optimizer", "precision", "learning_rate", "learning_rate_warmup_steps", "learning_rate_decay", "adam_epsilon",
        "weight_decay", "gradient_clipping", "activation_checkpointing", "seed",
    ],
}  # fmt: skip


NUMBERS = {float: st.floats(1e-9, 0.9), int: st.integers(0, 10**6)}


def any_of(section: str) -> st.SearchStrategy[dict[str, Any]]:
    types = {name: SECTIONS[section].model_fields[name].annotation for name in FREE[section]}
    return st.fixed_dictionaries(
        {name: NUMBERS[kind] if kind in NUMBERS else st.from_type(kind) for name, kind in types.items()}
    )


@st.composite
def configurations(draw: st.DrawFn) -> RunConfig:
    """Configurations that can run."""
    small = st.integers(1, 4)
    tp, pp, dp = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(small), draw(small)
    kv_heads = draw(st.sampled_from([1, 2, tp, 2 * tp, 3 * tp]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, tp]))
    head_dim = 2 * draw(st.integers(1, 8)) * draw(st.sampled_from([1, tp]))
    layers = draw(st.lists(st.integers(1, 9), min_size=pp, max_size=pp))
    base = draw(st.sampled_from([LLAMA, GPT2]))
    micro_batch_size = draw(st.integers(1, 8))
    model = {
        "num_hidden_layers": sum(layers), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "hidden_size": draw(st.sampled_from([heads * head_dim, heads * head_dim + 6])),
        "intermediate_size": tp * draw(st.integers(1, 300)), "vocab_size": draw(st.integers(1, 500)),
        "max_position_embeddings": 4096, **draw(any_of("model")),
    }  # fmt: skip
    parallel = {
        "tp": tp, "pp": pp, "dp": dp, "zero_stage": draw(st.sampled_from([0, 1])),
        "sequence_parallel": draw(st.booleans()),
        "partition": draw(st.sampled_from(["uniform", "parameters", "cost", layers])),
    }  # fmt: skip
    train = {
        "micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size * dp * draw(st.integers(1, 9)),
        "sequence_length": draw(st.integers(1, 600)), **draw(any_of("train")),
    }  # fmt: skip
    changes = {"model": model, "parallel": parallel, "train": train}
    raw = base.model_dump()
    config = RunConfig.model_validate({**raw, **{name: raw[name] | changes[name] for name in changes}})
    try:
        check(config, GPUS)
    except ConfigError:
        assume(False)
    return config


@settings(max_examples=300, deadline=None)
@given(configurations())
def test_only_sizes_shrink_and_keep_their_kind(config: RunConfig) -> None:
    twin = twin_of(config)
    check(twin, GPUS)
    for section, fields in FIELDS.items():
        before, after = getattr(config, section), getattr(twin, section)
        for field, fate in fields.items():
            if fate == KEPT:
                assert getattr(before, field) == getattr(after, field), f"{section}.{field}"
            assert type(getattr(before, field)) is type(getattr(after, field))
    assert twin.model.dropout == (config.model.dropout if config.parallel.tp == 1 else 0)
    changed = {key for key, (before, after) in reductions(config, twin).items() if before != after}
    assert changed <= {f"{section}.{field}" for section, fields in FIELDS.items() for field in fields}
    check_model(config, twin)
    check_batch(config, twin)


small = st.integers(1, 30)
any_generation = st.builds(
    Generate,
    batch_size=small,
    num_groups=st.none() | small,
    prefill_chunk=st.none() | small,
    prefill_batch_size=st.none() | small,
    prompt_length=st.integers(1, 99),
    max_new_tokens=st.integers(1, 99),
    num_requests=st.none() | small,
    block_size=small,
    top_k=st.integers(0, 300),
    temperature=st.sampled_from([0.0, 0.7]),
    request_rate=st.sampled_from([None, 2.0]),
    quantization=st.sampled_from(["none", "int8"]),
)


@settings(max_examples=300, deadline=None)
@given(any_generation, st.sampled_from([1, 2, 4]), st.sampled_from([100, 4096]), st.sampled_from([None, 40, 5000]))
def test_a_small_generation_goes_round_as_the_large_one(
    generate: Generate, pp: int, num_positions: int, window: int | None
) -> None:
    layout = {"parallel": LLAMA.parallel.model_copy(update={"pp": pp}), "generate": generate, "task": "generate"}
    shape = {"max_position_embeddings": num_positions, "family": "mistral", "sliding_window": window}
    config = LLAMA.model_copy(update={"model": LLAMA.model.model_copy(update=shape), **layout})
    config = config.model_copy(update={"train": config.train.model_copy(update={"sequence_length": 100})})
    try:
        check(config, GPUS)
    except ConfigError:
        assume(False)
    twin = twin_of(config)
    check(twin, GPUS)
    small, full = twin.generate, config.generate
    for field, fate in FIELDS["generate"].items():
        assert fate != KEPT or getattr(small, field) == getattr(full, field), field
    for field in ("batch_size", "prompt_length", "max_new_tokens", "block_size", "top_k"):
        assert getattr(small, field) <= getattr(full, field), field
    assert small.num_requests is not None
    assert small.num_requests > small.batch_size, "some enter later"
    groups = num_groups(config, full.batch_size)
    assert num_groups(twin, small.batch_size) == groups
    rows, own_rows = full.batch_size / groups, small.batch_size / groups
    assert own_rows <= 4
    assert (own_rows > 1, own_rows.is_integer()) == (rows > 1, rows.is_integer())

    def kinds(settings: Generate) -> list[bool]:
        chunk, at_once = settings.prefill_chunk, settings.prefill_batch_size
        return [
            chunk is not None and chunk < settings.prompt_length,
            at_once is not None and at_once < settings.batch_size // groups,
            settings.top_k > 0,
        ]

    assert kinds(small) == kinds(full)
    seen = twin.model.sliding_window
    assert seen == (6 if window == 40 else window)
    off = {key for key, (_, after) in reductions(config, twin).items() if after == "none"}
    assert off == ({"generate.quantization"} if full.quantization == "int8" else set())


def test_prompts_that_are_given_make_the_same_twin() -> None:
    changes = {"task": "generate", "generate": Generate(prompt="once upon a time", stop_strings=["."], stop_tokens=[3])}
    assert twin_of(LLAMA.model_copy(update=changes)) == twin_of(
        LLAMA.model_copy(update={"task": "generate", "generate": Generate()})
    )


@pytest.mark.parametrize(
    ("window", "expected"), [(1, 1), (6, 1), (32, 5), (64, 10), (127, 19), (128, 128), (4096, 4096), (None, None)]
)
def test_a_window_hides_as_large_a_share(window: int | None, expected: int | None) -> None:
    """Of 20 positions instead of 128; one that hides nothing does so there, too."""
    model = LLAMA.model.model_copy(update={"family": "mistral", "sliding_window": window})
    twin = twin_of(LLAMA.model_copy(update={"model": model}))
    assert (LLAMA.train.sequence_length, twin.train.sequence_length) == (128, 20)
    assert twin.model.sliding_window == expected


def check_model(config: RunConfig, twin: RunConfig) -> None:
    tp, pp = config.parallel.tp, config.parallel.pp
    full, small = config.model, twin.model
    assert pp <= small.num_hidden_layers <= full.num_hidden_layers
    assert small.num_hidden_layers <= 3 * pp
    if isinstance(config.parallel.partition, list):
        sizes, kept = config.parallel.partition, twin.parallel.partition
        assert isinstance(kept, list)
        assert all((kept[i] > kept[i + 1]) <= (sizes[i] > sizes[i + 1]) for i in range(pp - 1))
        assert (len(set(kept)) == 1) == (len(set(sizes)) == 1)
    else:
        assert (small.num_hidden_layers % pp == 0) == (full.num_hidden_layers % pp == 0)

    def kinds(model: Model) -> list[bool]:
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        return [
            kv_heads == heads,
            kv_heads < tp,
            kv_heads > tp,  # several on a rank
            heads > max(kv_heads, tp),
            model.hidden_size == heads * model.head_dim,
        ]

    assert kinds(small) == kinds(full)
    assert small.vocab_size % tp == full.vocab_size % tp
    assert small.num_attention_heads <= 4 * tp


def check_batch(config: RunConfig, twin: RunConfig) -> None:
    tp = config.parallel.tp
    full, small = config.train, twin.train
    assert small.sequence_length % tp == full.sequence_length % tp
    assert small.sequence_length <= min(full.sequence_length, 20 + 2 * tp)
    assert small.micro_batch_size == min(2, full.micro_batch_size)
    assert twin.num_micro_batches == min(4, config.num_micro_batches)
    assert small.global_batch_size == small.micro_batch_size * twin.num_micro_batches * config.parallel.dp
