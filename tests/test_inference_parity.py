"""Every family generates what one rank computes, in every layout; and the check reports what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import make_config
from ranks_inference_parity import DEFECTS

from harness.launch.verify import _layout_key
from harness.spec.families import FAMILIES

MODELS = {
    "gpt2": "model=gpt2_tiny",
    "untied": "model=gpt2_tiny model.tie_word_embeddings=false",
    "llama": "model=llama_tiny model.num_key_value_heads=2",
    "mistral": "model=llama_tiny model.family=mistral model.sliding_window=40 model.num_key_value_heads=2",
    "qwen2": "model=llama_tiny model.family=qwen2 model.num_key_value_heads=1",
    "qwen3": "model=llama_tiny model.family=qwen3 model.tie_word_embeddings=true",
    "bert": "model=bert_tiny train.objective=causal",
    "encoder": "model=encoder_tiny train.objective=causal",
    "emulated": "model=emulated model.forward_seconds=0",
}  # fmt: skip
WAYS = [
    "",
    "generate.prefill_chunk=16 generate.prefill_batch_size=1",
    "generate.num_groups=3 generate.batch_size=7",
    "generate.num_groups=1 generate.temperature=0.9 generate.top_k=40 generate.top_p=0.95",
    "generate.prefill_chunk=16 generate.repetition_penalty=1.3 train.precision=bf16",
    "generate.temperature=1.2 generate.repetition_penalty=1.2 generate.num_groups=5 generate.prefill_chunk=5",
]
LAYOUTS = ["parallel.tp=2 parallel.pp=2", "parallel.tp=4", "parallel.pp=4"]
SAMPLED = "generate.temperature=1.0 generate.top_k=8 generate.top_p=0.9 parallel.tp=4"
LAYER = "task=forward model.part=layer parallel.tp=4"

PASSES = {
    f"{name} {layout} {way}": f"task=generate {model} {layout} {way}"
    for n, (name, model) in enumerate(MODELS.items())
    for layout, way in (
        (LAYOUTS[n % 3], WAYS[n % len(WAYS)]),
        (LAYOUTS[(n + 1) % 3], WAYS[(n + 1 + n // 3) % len(WAYS)]),
    )
} | {
    f"forward {n}": f"task=forward {overrides}"
    for n, overrides in enumerate([
        f"{MODELS['gpt2']} {LAYOUTS[0]}", f"{MODELS['mistral']} {LAYOUTS[1]} model.sliding_window=5",
        f"model=bert_tiny {LAYOUTS[2]} train.precision=bf16", f"model.part=layer {MODELS['llama']} {LAYOUTS[1]}",
    ])
}  # fmt: skip

GENERATE = "task=generate parallel.tp=2 parallel.pp=2"
CHUNKS = "generate.prefill_chunk=16"
EXPECTED = {
    "positions_one_too_far": (f"{GENERATE} {MODELS['gpt2']}", "scores"),
    "positions_of_the_first_row": (f"{GENERATE} {MODELS['llama']}", "scores"),
    "mask_one_too_late": (f"{GENERATE} {MODELS['llama']} {CHUNKS}", "scores"),
    "mask_one_too_early": (f"{GENERATE} {MODELS['gpt2']}", "scores"),
    "mask_left_out": (f"{GENERATE} {MODELS['gpt2']}", "scores"),
    "window_one_too_wide": (f"{GENERATE} {MODELS['mistral']} {CHUNKS}", "scores"),
    "key_value_heads_swapped": (f"{GENERATE} {MODELS['llama']} model.num_key_value_heads=4", "scores"),
    "slots_of_the_neighbours": (f"{GENERATE} {MODELS['llama']}", "scores"),
    "last_tokens_of_chunks_not_kept": (f"{GENERATE} {MODELS['qwen2']} {CHUNKS}", "scores"),
    "scores_of_the_padding": (f"{GENERATE} {MODELS['gpt2']}", "scores"),
    "sums_not_reduced": (f"{GENERATE} {MODELS['llama']}", "scores"),
    "row_bias_added_on_every_rank": (f"{GENERATE} {MODELS['gpt2']}", "scores"),
    "one_head_off_by_a_thousandth": (f"task=generate parallel.tp=4 {MODELS['llama']}", "scores"),
    "tokens_of_the_wrong_shard": (f"{GENERATE} {MODELS['llama']}", "tokens"),
    "each_shard_draws_for_itself": (f"task=generate {SAMPLED} {MODELS['gpt2']}", "drawn tokens"),
    "noise_of_the_next_position": (f"task=generate {SAMPLED} {MODELS['gpt2']}", "drawn tokens"),
    "padding_of_the_vocabulary_is_chosen": (
        f"task=generate parallel.tp=4 {MODELS['gpt2']} model.vocab_size=257", "tokens"
    ),
    "a_sequence_ends_early": (f"{GENERATE} {MODELS['qwen3']}", "tokens"),
    "penalty_of_who_was_there_before": (f"{GENERATE} {MODELS['gpt2']} generate.repetition_penalty=3", "tokens"),
    "cache_with_a_slot_too_many": (f"{GENERATE} {MODELS['llama']}", "cache bytes"),
    "layer_differs_on_a_rank": (f"{LAYER} {MODELS['llama']}", "outputs of the layer"),
    "hidden_states_of_the_pass_before": (f"task=forward {MODELS['llama']} parallel.pp=4", "scores"),
}  # fmt: skip
"""Defect -> (run, a comparison that must fail)."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Comparisons of all runs, from one launch."""
    cases = {name: ("none", overrides) for name, overrides in PASSES.items()}
    cases |= {name: (name, overrides) for name, (overrides, _) in EXPECTED.items()}
    argument = [[defect, overrides.split()] for defect, overrides in cases.values()]
    folder: Path = tmp_path_factory.mktemp("ranks")
    found: list[list[dict[str, Any]]] = run_ranks(4, "ranks_inference_parity", argument, folder)
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", PASSES)
def test_what_one_rank_computes(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    found, overrides = answers[name], PASSES[name]
    assert all(comparison["passed"] for comparison in found), found
    drawn = "drawn tokens" if "temperature" in overrides else "tokens"
    scores = ["outputs of the layer" if "model.part=layer" in overrides else "scores"]
    wanted = [*scores, drawn, "cache bytes"] if "generate" in overrides else scores
    assert [comparison["kind"] for comparison in found] == wanted
    # Rounding shows, and leaves room: of fp32 a tenth of what is allowed, of bf16 half.
    assert 1e-9 < found[0]["error"] < found[0]["tolerance"] / (2 if "bf16" in overrides else 10)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_defect_is_reported(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    assert EXPECTED[name][1] in [comparison["kind"] for comparison in answers[name] if not comparison["passed"]]


def test_every_defect_and_family_is_met() -> None:
    assert {*EXPECTED} == {*DEFECTS} - {"none"}
    assert {make_config(*model.split()).model.family for model in MODELS.values()} == {*FAMILIES}


def key(*overrides: str) -> str:
    return _layout_key(make_config("task=generate", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["generate.max_new_tokens=7"], ["generate.seed=3", "train.seed=3"], ["generate.repeats=9"],
        ["generate.prompt_length=9"], ["generate.prompt=hello"], ["generate.request_rate=5"],
        ["generate.batch_size=64"], ["generate.num_requests=50"], ["generate.stop_tokens=[3]"],
    ],
)  # fmt: skip
def test_layouts_that_are_checked_once(overrides: list[str]) -> None:
    assert key(*overrides) == key()


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tp=2"], ["parallel.pp=2"], ["train.precision=bf16"], ["generate.num_groups=2"],
        ["generate.batch_size=2"], ["generate.prefill_chunk=8"], ["generate.prefill_batch_size=2"],
        ["generate.temperature=1.0"], ["generate.repetition_penalty=1.1"], ["model=llama_tiny"], ["task=forward"],
        ["task=train"],
    ],
)  # fmt: skip
def test_layouts_that_are_checked_each(overrides: list[str]) -> None:
    assert key(*overrides) != key()
