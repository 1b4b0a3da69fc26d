"""Counted memory and the FLOP conventions of peers: by hand, and as PyTorch keeps it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers_model import saved_bytes
from torch import nn

from harness.model.assembly import build_layers, describe_layers
from harness.model.block import TransformerBlock
from harness.model.context import PassContext
from harness.model.emulated import EmulatedBlock
from harness.model.groups import TensorParallel
from harness.model.precision import dtype_of
from harness.model.weight_gradients import PutOff, WeightGradients, add_gradients
from harness.plan.memory import (
    block_activation_bytes_per_token,
    gradient_bytes_per_parameter,
    head_inputs,
    head_puts_off,
    memory_beside_measured,
    memory_per_stage,
    optimizer_bytes_per_parameter,
    put_off_bytes_per_token,
)
from harness.spec.config import Model, RunConfig
from harness.spec.counts import flops_conventions, stage_counts, stage_parameters_per_rank
from tests.helpers import make_config


def big(*overrides: str) -> RunConfig:
    return make_config("launch.max_ranks_per_core=64", *overrides)


def test_parameters_and_their_companions_by_hand() -> None:
    """gpt2_small on 2 stages x 2 tensor-parallel ranks, AdamW in fp32."""
    config = big("model=gpt2_small", "parallel.pp=2", "parallel.tp=2", "parallel.partition=[7,5]")
    block = (768 * 2304 + 2304 + 768 * 768 + 768 * 3072 + 3072 + 3072 * 768) // 2 + 4 * 768 + 2 * 768
    vocabulary = 50258 // 2 * 768  # padded to an even number
    first, last = memory_per_stage(config, [7, 5])
    assert first.parameter_bytes == 4 * (7 * block + vocabulary + 1024 * 768)
    assert last.parameter_bytes == 4 * (5 * block + vocabulary + 2 * 768)
    assert first.gradient_bytes == first.parameter_bytes
    assert first.optimizer_bytes == 2 * first.parameter_bytes
    assert first.buffer_bytes == last.buffer_bytes == 4 * 768 * config.train.micro_batch_size * 128
    parts = (first.parameter_bytes, first.gradient_bytes, first.optimizer_bytes, first.activation_bytes)
    assert first.total_bytes == sum(parts) + first.buffer_bytes


def test_buffers_and_masks_by_hand() -> None:
    """A middle stage receives from both sides; the embedding's mask is one byte per value, on the first stage alone."""
    layout = ["model=gpt2_small", "parallel.pp=3", "train.global_batch_size=8"]
    tokens, width = 128, 768
    for slices, sharing in ((1, []), (2, ["parallel.tp=2", "parallel.sequence_parallel=true"])):
        whole, dropped = (
            memory_per_stage(big(*layout, *sharing, f"model.dropout={rate}"), [4, 4, 4]) for rate in (0.0, 0.1)
        )
        assert [stage.buffer_bytes for stage in whole] == [n * 4 * tokens * width / slices for n in (1, 2, 1)]
        masks = [b.activation_bytes - a.activation_bytes for a, b in zip(whole, dropped, strict=True)]
        of_stages = [in_flight * (4 * 2 + (s == 0)) for s, in_flight in enumerate((3, 2, 1))]
        assert masks == [n * tokens * width / slices for n in of_stages]


def test_ranks_that_share_a_head_keep_all_of_its_keys() -> None:
    """llama with h = f = 64, 4 heads of 16, one key-value head on 2 ranks: q = 32, k = 16, f = 32 on each."""
    shape = ["hidden_size=64", "intermediate_size=64", "num_attention_heads=4", "num_key_value_heads=1", "head_dim=16"]
    config = big("model=llama_tiny", *(f"model.{key}" for key in shape), "parallel.tp=2")
    counted = block_activation_bytes_per_token(config.model, config.parallel, "fp32")
    assert counted == 4 * (4 * 64 + 3 * (32 + 16) + 4 * 32) + 4 * (4 // 2 + 2)


def test_measured_beside_counted() -> None:
    config = big("parallel.pp=2", "parallel.tp=2", "parallel.dp=2")
    first, last = memory_beside_measured(config, [2, 2], [1, 5, 2, 3, 7, 9, 8, 6], "cpu")  # ranks 0-3 are stage 0
    assert (first["measured_peak_bytes"], last["measured_peak_bytes"]) == (5, 9)
    assert first["measured"] == "resident memory of the process"
    assert first["total_bytes"] == memory_per_stage(config, [2, 2])[0].total_bytes
    assert "device" in memory_beside_measured(config, [2, 2], [0] * 8, "cuda")[0]["measured"]


@pytest.mark.parametrize("name", ["gpt2_tiny", "llama_tiny", "llama_1b", "bert_tiny", "encoder_tiny"])
@pytest.mark.parametrize("layers", [[4], [2, 2], [1, 2, 1]])
def test_one_rank_per_stage_holds_what_the_stage_holds(name: str, layers: list[int]) -> None:
    config = big(f"model={name}", f"parallel.pp={len(layers)}")
    counted = [stage.parameters for stage in stage_counts(config, layers)]
    last = len(layers) - 1
    assert counted == [
        stage_parameters_per_rank(config.model, 1, number, s == 0, s == last) for s, number in enumerate(layers)
    ]


@pytest.mark.parametrize(
    ("name", "tp"), list(product(["gpt2_tiny", "llama_tiny", "bert_tiny", "encoder_tiny"], [1, 2, 4, 8]))
)
def test_the_model_holds_as_many_parameters(name: str, tp: int) -> None:
    model = make_config(f"model={name}").model
    kv_size = max(1, tp // model.num_key_value_heads)
    layers = build_layers(model, TensorParallel(group=None, rank=0, size=tp, kv_group=None, kv_size=kv_size))
    held = sum(parameter.numel() for parameter in layers.parameters())
    assert held == stage_parameters_per_rank(model, tp, model.num_hidden_layers, first=True, last=True)


@pytest.mark.parametrize(
    ("overrides", "gradient", "optimizer"),
    [
        (["train.precision=fp32"], 4, 8),
        (["train.precision=fp32", "train.optimizer=sgd"], 4, 0),
        (["train.precision=fp32", "parallel.zero_stage=1"], 4, (8 + 4) / 2),
        (["train.precision=bf16"], 2 + 2, (8 + 4) / 2),  # DeepSpeed's bf16 optimizer always shares its state
        (["train.precision=bf16", "parallel.zero_stage=1"], 2 + 4, (8 + 4) / 2),
        (["train.precision=bf16", "train.optimizer=sgd"], 2 + 2, 4 / 2),
    ],
)
def test_bytes_per_parameter(overrides: list[str], gradient: float, optimizer: float) -> None:
    config = make_config("parallel.dp=2", *overrides)
    assert gradient_bytes_per_parameter(config) == gradient
    assert optimizer_bytes_per_parameter(config) == optimizer


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_block_activations_are_the_papers_less_dropout_and_scores(tp: int) -> None:
    """arXiv 2205.05198, equation 2: s b h (10 + 24 / t + 5 a s / (h t)); the masks are 2 of the 10."""
    config = big("model=gpt2_small", f"parallel.tp={tp}")
    statistics = 4 * 12 // tp + 2 * 2 * 4
    counted = block_activation_bytes_per_token(config.model, config.parallel, "bf16")
    assert counted == 768 * (8 + 24 / tp) + statistics


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sequence_parallelism_divides_all_block_activations(tp: int) -> None:
    """arXiv 2205.05198, equation 4: s b h (34 / t + 5 a s / (h t)), with the masks of dropout."""
    config = big("model=gpt2_small", f"parallel.tp={tp}", "parallel.sequence_parallel=true", "model.dropout=0.1")
    alone = big("model=gpt2_small", "model.dropout=0.1")
    counted = block_activation_bytes_per_token(config.model, config.parallel, "bf16")
    assert counted == (768 * 34 + 4 * 12 + 2 * 2 * 4) / tp
    assert counted * tp == block_activation_bytes_per_token(alone.model, alone.parallel, "bf16")
    (sliced,), (whole,) = memory_per_stage(config, [12]), memory_per_stage(alone, [12])
    logits = config.train.sequence_length * (4 + 4) * (-(-50257 // tp) - 50257 / tp)  # padding
    assert sliced.activation_bytes - logits == pytest.approx(whole.activation_bytes / tp)


def saved_bytes_per_token(model: Model, dtype: torch.dtype) -> float:
    """What PyTorch keeps for a block's backward, its own parameters aside."""
    block = TransformerBlock(model, TensorParallel.single(), activation_checkpointing=False).to(dtype)
    hidden = torch.randn(2, 64, model.hidden_size, dtype=dtype, requires_grad=True)
    return saved_bytes(block, hidden) / (2 * 64)


def test_pytorch_keeps_as_much_for_backward() -> None:
    gpt2, llama = make_config("model=gpt2_tiny"), make_config("model=llama_tiny")
    counted = block_activation_bytes_per_token(gpt2.model, gpt2.parallel, "fp32")
    assert saved_bytes_per_token(gpt2.model, torch.float32) == counted
    counted = block_activation_bytes_per_token(gpt2.model, gpt2.parallel, "bf16")
    assert saved_bytes_per_token(gpt2.model, torch.bfloat16) == counted - 8  # statistics in bf16 on CPU
    # On CPU an RMSNorm keeps the normalized input too; cosines and sines are there once per sequence.
    norms, rotary = 2 * 4 * llama.model.hidden_size, 2 * 4 * llama.model.head_dim * 64 / (2 * 64)
    counted = block_activation_bytes_per_token(llama.model, llama.parallel, "fp32")
    assert saved_bytes_per_token(llama.model, torch.float32) == counted + norms + rotary


@pytest.mark.parametrize("overrides", [["model=bert_tiny"], ["model=bert_tiny", "train.objective=causal"],
                                       ["model=encoder_tiny"]])  # fmt: skip
def test_pytorch_keeps_as_much_with_norms_behind_the_sums(overrides: list[str]) -> None:
    config = make_config(*overrides)
    counted = block_activation_bytes_per_token(config.model, config.parallel, "fp32")
    assert saved_bytes_per_token(config.model, torch.float32) == counted


def test_pytorch_keeps_no_mask_per_block() -> None:
    config = make_config("model=llama_tiny", "model.family=mistral", "model.sliding_window=16")
    whole = config.model.model_copy(update={"sliding_window": None})
    shared = 4 * 64 * 64 / (2 * 64)
    found = saved_bytes_per_token(config.model, torch.float32)
    assert found == saved_bytes_per_token(whole, torch.float32) + shared


def test_blocks_of_a_pass_keep_one_mask_of_documents() -> None:
    """Of a number for every pair of positions, in the type of the scores."""
    context, config = PassContext(), make_config("model=gpt2_tiny", "data.documents=packed")
    blocks = [TransformerBlock(config.model, TensorParallel.single(), False, f"blocks.{i}", context) for i in range(2)]
    hidden, found = torch.randn(2, 64, config.model.hidden_size, requires_grad=True), []
    for documents in (None, lambda *_: torch.zeros(2, 64, dtype=torch.long)):
        context.documents = documents
        found.append(saved_bytes(nn.Sequential(*blocks), hidden) / (2 * 64))
    assert found[1] - found[0] == 4 * 64
    (packed,), (cut,) = (memory_per_stage(c, [4]) for c in (config, make_config("model=gpt2_tiny")))
    positions = config.train.micro_batch_size * config.train.sequence_length
    assert packed.activation_bytes - cut.activation_bytes == positions * 4 * config.train.sequence_length


def test_computing_again_takes_one_mask_of_documents() -> None:
    """Of the micro-batch whose block is computed, and none of those in flight."""
    options = ["model=gpt2_tiny", "parallel.pp=2", "train.activation_checkpointing=full", "parallel.tp=1"]
    packed, cut = (
        memory_per_stage(make_config(*options, f"data.documents={kind}"), [2, 2]) for kind in ("packed", "cut")
    )
    assert packed[0].micro_batches_in_flight == 2
    assert [a.activation_bytes - b.activation_bytes for a, b in zip(packed, cut, strict=True)] == [4 * 128 * 128] * 2


def test_what_is_peculiar_to_families_by_hand() -> None:
    """Statistics of norms of heads; the mask of a window; what BERT has before its blocks and behind them."""

    def stages(*overrides: str) -> list[float]:
        return [stage.activation_bytes for stage in memory_per_stage(big(*overrides), [2, 2])]

    common = ("parallel.pp=2", "train.micro_batch_size=2", "train.global_batch_size=8")
    llama = ("model=llama_tiny", "model.num_key_value_heads=2", "parallel.tp=2", *common)
    tokens, in_flight = 2 * 128, (2, 1)
    plain, normed = stages(*llama), stages(*llama, "model.family=qwen3")
    for stage in range(2):  # 4 query heads and 1 key head on a rank
        assert normed[stage] - plain[stage] == in_flight[stage] * tokens * 2 * 4 * (4 + 1)
    windowed = stages(*llama, "model.family=mistral", "model.sliding_window=100")
    assert [b - a for a, b in zip(plain, windowed, strict=True)] == [4 * 128 * 128] * 2
    assert stages(*llama, "model.family=mistral", "model.sliding_window=128") == plain

    shape = ("model.vocab_size=257", "train.objective=causal", *common)
    bert, encoder = (stages(f"model={name}", *shape) for name in ("bert_tiny", "encoder_tiny"))
    gelu = 2 * 4 * 1024  # its input, in two blocks
    first, last = ((b - a) / tokens for a, b in zip(encoder, bert, strict=True))
    assert first == 2 * (gelu + 4 * 256)  # and the input of the embedding's norm, of two micro-batches
    assert last == gelu + 3 * 4 * 256


@pytest.mark.parametrize(("name", "inputs"), [("bert_tiny", 4), ("encoder_tiny", 1), ("gpt2_tiny", 2)])
def test_pytorch_keeps_the_inputs_of_what_is_behind_the_blocks(name: str, inputs: int) -> None:
    """Of dense layer, activation and norm, or of a norm, and of the output matrix; besides, a norm's statistics."""
    model = make_config(f"model={name}", "model.tie_word_embeddings=false").model
    layers = describe_layers(model, TensorParallel.single())
    blocks = [layer.name.startswith("blocks.") for layer in layers]
    head = nn.Sequential(*(layer.build() for layer in layers[len(blocks) - blocks[::-1].index(True) :]))
    hidden = torch.randn(2, 64, model.hidden_size, requires_grad=True)
    statistics = 0 if name == "encoder_tiny" else 2 * 4
    assert head_inputs(model) == inputs
    assert saved_bytes(head, hidden) / (2 * 64) == inputs * 4 * model.hidden_size + statistics


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", [["model=gpt2_tiny"], ["model=llama_tiny", "model.num_key_value_heads=1"],
                                       ["model=bert_tiny"], ["model=llama_tiny", "model.family=qwen3"]])  # fmt: skip
def test_half_of_a_split_backward_pass_keeps_as_much_for_the_other(overrides: list[str], precision: str) -> None:
    config = make_config(*overrides, f"train.precision={precision}")
    model, later, dtype = (
        config.model,
        WeightGradients(),
        dtype_of(config.train.precision),
    )
    block = TransformerBlock(model, TensorParallel.single(later), activation_checkpointing=False).to(dtype)
    output = block(torch.randn(2, 64, model.hidden_size, dtype=dtype, requires_grad=True))
    output.backward(torch.randn_like(output))
    left = later.take()
    assert left_bytes(left, block) / (2 * 64) == put_off_bytes_per_token(model, config.parallel, config.train.precision)
    add_gradients(left)
    assert all(parameter.grad is not None for parameter in block.parameters())


def left_bytes(left: list[PutOff], module: nn.Module) -> int:
    """Held by what was put off, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held = [cell.cell_contents for part in left for cell in part.compute.__closure__ or ()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held if isinstance(t, torch.Tensor)}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("name", ["gpt2_tiny", "bert_tiny"])
def test_what_is_behind_the_blocks_puts_off_as_much(name: str) -> None:
    model, later = make_config(f"model={name}", "model.tie_word_embeddings=false").model, WeightGradients()
    layers = describe_layers(model, TensorParallel.single(later))
    behind = [layer for layer in layers if layer.name == "final_norm" or layer.name.startswith("head")]
    head = nn.Sequential(*(layer.build() for layer in behind))
    output = head(torch.randn(2, 64, model.hidden_size, requires_grad=True))
    output.backward(torch.randn_like(output))
    counted = head_puts_off(model) * model.hidden_size + model.vocab_size
    assert left_bytes(later.take(), head) / (2 * 64) == 4 * counted


def test_a_block_that_waits_keeps_nothing_and_holds_its_vector_whole() -> None:
    config = make_config("model=emulated", "model.forward_seconds=0", "model.backward_seconds=0")
    block = EmulatedBlock(config.model, TensorParallel.single(), activation_checkpointing=False)
    assert saved_bytes(block, torch.randn(2, 8, 64, requires_grad=True)) == 0
    assert block_activation_bytes_per_token(config.model, config.parallel, "fp32") == 0
    assert stage_parameters_per_rank(config.model, 2, 1, first=False, last=False) == 64


def test_activations_of_stages_by_hand() -> None:
    """gpt2_small in bf16, 3 stages, 4 micro-batches of 2 x 64 tokens."""
    shape = ["model=gpt2_small", "train.precision=bf16", "train.micro_batch_size=2", "train.sequence_length=64"]
    config = big(*shape, "parallel.pp=3", "train.global_batch_size=8")
    stages = memory_per_stage(config, [5, 4, 3])
    assert [stage.micro_batches_in_flight for stage in stages] == [3, 2, 1]
    block = 32 * 768 + 4 * 12 + 16
    hidden, tokens = 2 * 768, 2 * 64
    logits = 50257 * (2 + 4 + 2)  # the logits, exponentials in fp32 and bf16
    assert stages[0].activation_bytes == tokens * 3 * (5 * block + hidden)  # and what goes out
    assert stages[1].activation_bytes == tokens * 2 * (4 * block + hidden)
    assert stages[2].activation_bytes == tokens * (3 * block + 2 * hidden + logits)
    full = memory_per_stage(big(*shape, "parallel.pp=3", "train.global_batch_size=8",
                                "train.activation_checkpointing=full"), [5, 4, 3])  # fmt: skip
    assert full[0].activation_bytes == tokens * (3 * (5 * hidden + hidden) + block)
    (alone,) = memory_per_stage(big(*shape, "train.global_batch_size=2"), [12])
    assert alone.activation_bytes == tokens * (12 * block + 2 * hidden + logits)
    assert alone.buffer_bytes == 0


def test_flops_conventions_of_gpt2_small_by_hand() -> None:
    found = flops_conventions(make_config("model=gpt2_small").model, 1024)
    blocks = 12 * (2 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 4 * 1024 * 768)
    head = 2 * 768 * 50257
    attention = 12 * 12 * 12 * 64 * 1024
    assert found["shardwright"] == 3 * (blocks + head) == 854438400
    assert found["shardwright_causal"] == 854438400 - attention / 2
    assert found["megatron_lm"] == 854438400 - attention / 2 + 6 * 768 * (50304 - 50257)
    assert found["megatron_paper"] == pytest.approx(96 * 12 * 768**2 * (1 + 1024 / (6 * 768) + 50257 / (16 * 12 * 768)))
    assert found["palm"] == found["torchtitan"] == 6 * (124439808 - 1024 * 768) + attention


def test_flops_conventions_of_llama3_8b_by_hand() -> None:
    found = flops_conventions(make_config("model=llama3_8b").model, 8192)
    products = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256
    attention = 12 * 32 * 32 * 128 * 8192
    assert found["shardwright"] == 6 * products + attention == 57912852480
    assert found["shardwright_causal"] == found["megatron_lm"] == 57912852480 - attention / 2
    assert found["megatron_paper"] == 57912852480 + (6 * (products - 4096 * 128256) + attention) / 3
    assert found["palm"] == 6 * 8030261248 + attention
    assert found["torchtitan"] == 6 * (8030261248 - 4096 * 128256) + attention


@pytest.mark.parametrize(("name", "length"), [("gpt2_small", 1024), ("llama3_8b", 8192)])
def test_conventions_differ_as_much_as_they_do(name: str, length: int) -> None:
    """No convention is silently another one, and none is far off."""
    found = flops_conventions(make_config(f"model={name}").model, length)
    values = sorted(found.values())
    assert values[-1] / values[0] < 1.6
