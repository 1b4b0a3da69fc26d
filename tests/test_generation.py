"""Sequences are those that `transformers` generates, whatever the layout, the groups and who else is worked on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from helpers_model import random_state
from ranks_generate import config_of, shape_of
from references import build_reference, encoder_state
from states import to_transformers

from harness.spec.kv_cache import kv_cache_bytes, longest_sequence

FAMILIES = {
    "gpt2": "gpt2", "llama": "llama grouped", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3",
    "bert": "bert causal", "encoder": "encoder causal", "scaled": "llama scaled", "untied": "gpt2 untied",
}  # fmt: skip
"""Name in tests -> model of `references`. Of grouped heads there are two key-value heads: fewer than tp=4 and 8."""
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4)]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"generate": {"prefill_chunk": 3, "prefill_batch_size": 2}},
    "entering and leaving": {"generate": {"batch_size": 3, "num_groups": 2}, "at_once": 2},
    "one group": {"generate": {"batch_size": 4, "num_groups": 1, "block_size": 5}},
    "many groups of chunks": {"generate": {"batch_size": 5, "num_groups": 5, "prefill_chunk": 4}, "at_once": 1},
    "one phase, then the other": {
        "generate": {"num_groups": 3, "prefill_batch_size": 1, "prefill_chunk": 16},
        "phases": [["prefill"], ["decode"]],
    },
}
PENALTIES = {"gpt2": 2.0, "bert causal": 3.0, "encoder causal": 3.0, "gpt2 untied": 2.0}
"""Of repetition: without it these models with random weights say one token again and again."""
NEW = 12
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(211, (length,), generator=generator).tolist() for length in (7, 3, 12, 1, 40, 9)]


@cache
def greedy(name: str) -> list[list[int]]:
    """What `transformers` generates from each prompt on its own, in fp32."""
    model = shape_of(name)
    reference = build_reference(model, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if model.family == "encoder":
        reference.load_state_dict(encoder_state(random_state(model)), strict=False)
    else:
        reference.load_state_dict(to_transformers(random_state(model), model), strict=False)
        if model.tie_word_embeddings:
            reference.tie_weights()
    reference.eval()
    penalty = PENALTIES.get(name, 1.0)
    return [continued(reference, prompt, model.max_position_embeddings, penalty) for prompt in prompts()]


@torch.no_grad()
def continued(reference: Any, prompt: list[int], most: int, penalty: float) -> list[int]:
    count, settings = min(NEW, most - len(prompt)), {"do_sample": False, "repetition_penalty": penalty}
    if hasattr(reference, "generate"):
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        found = reference.generate(tokens, max_new_tokens=count, attention_mask=mask, **settings)
        return found[0, len(prompt) :].tolist()
    known = list(prompt)
    for _ in range(count):
        scores = reference(torch.tensor([known])).logits[0, -1]
        for token in set(known):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        known.append(int(scores.argmax()))
    return known[len(prompt) :]


def stops_of(name: str) -> list[int]:
    """Two tokens that come early in some of the sequences, and so end them."""
    return [greedy(name)[0][3], greedy(name)[2][6]]


def cut(tokens: list[int], stops: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


def cases(num_ranks: int) -> dict[str, dict[str, Any]]:
    """Each family in each layout in one of the ways; the ways take turns."""
    found: dict[str, dict[str, Any]] = {}
    for f, (family, name) in enumerate(FAMILIES.items()):
        for number, layout in enumerate(LAYOUTS):
            if layout[0] * layout[1] != num_ranks:
                continue
            way = [*WAYS][(f + number) % len(WAYS)]
            case = {"model": name, "layout": layout, "prompts": prompts()} | WAYS[way]
            settings = {"max_new_tokens": NEW, "repetition_penalty": PENALTIES.get(name, 1.0)}
            case["generate"] = settings | case.get("generate", {})
            if (f + 2 * number) % 3 == 0:
                case["stops"] = stops_of(name)
            found[f"{family}-{layout[0]}x{layout[1]}"] = case
    for layout in LAYOUTS:
        if layout[0] * layout[1] == num_ranks:
            settings = {"max_new_tokens": NEW, "batch_size": 4, "num_groups": min(4, layout[1])} | SAMPLED
            case = {"model": "llama grouped", "layout": layout, "prompts": prompts(), "generate": settings}
            found[f"sampled-{layout[0]}x{layout[1]}"] = case
    return found


@pytest.fixture(
    scope="module", params=[(1, 2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=lambda sizes: f"{sizes[-1]}"
)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, of all layouts of some numbers of ranks."""
    found: dict[str, Any] = {}
    for num_ranks in request.param:
        folder: Path = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        found |= run_ranks(num_ranks, "ranks_generate", cases(num_ranks), folder)
    return found


def layouts_of(answers: dict[str, Any]) -> list[tuple[int, int]]:
    found = [(tp, pp) for tp, pp in LAYOUTS if f"sampled-{tp}x{pp}" in answers]
    assert len(found) > 3
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_in_every_layout(family: str, answers: dict[str, Any]) -> None:
    name = FAMILIES[family]
    for tp, pp in layouts_of(answers):
        case = cases(tp * pp)[f"{family}-{tp}x{pp}"]
        stops, answer = case.get("stops", []), answers[f"{family}-{tp}x{pp}"]
        expected = [cut(tokens, stops) for tokens in greedy(name)]
        assert answer["tokens"] == expected, (tp, pp, case)
        reasons = ["stop" if tokens[-1] in stops else "length" for tokens in expected]
        assert answer["reasons"] == reasons


def test_the_longest_prompt_ends_where_the_positions_do(answers: dict[str, Any]) -> None:
    known = [found for tp, pp in layouts_of(answers) for found in cases(tp * pp).items() if found[0] in answers]
    assert {len(answers[key]["tokens"][4]) for key, case in known if not case.get("stops")} == {48 - 40}


def test_stops_end_some_sequences_and_not_all() -> None:
    """Or the others would prove nothing."""
    for name in FAMILIES.values():
        lengths = {len(cut(tokens, stops_of(name))) for tokens in greedy(name)}
        assert len(lengths) > 2


def test_sampled_tokens_are_the_same_in_every_layout(answers: dict[str, Any]) -> None:
    found = {str(answers[f"sampled-{tp}x{pp}"]["tokens"]) for tp, pp in layouts_of(answers)}
    assert len(found) == 1
    assert found != {str(greedy("llama grouped"))}


def test_the_bytes_of_every_cache_are_predicted(answers: dict[str, Any]) -> None:
    for num_ranks in {tp * pp for tp, pp in layouts_of(answers)}:
        for key, case in cases(num_ranks).items():
            config, lengths = config_of(case), [len(prompt) for prompt in case["prompts"]]
            slots = min(config.generate.batch_size, len(lengths))
            stages = kv_cache_bytes(config, slots, longest_sequence(config, lengths))
            ranks = [config.parallel.topology.coordinate(rank).pp for rank in range(num_ranks)]
            assert answers[key]["bytes"] == [stages[stage] for stage in ranks], key


def test_a_window_bounds_the_cache() -> None:
    case = {"model": "mistral", "layout": (1, 1), "generate": {"block_size": 3, "max_new_tokens": 30}}
    config = config_of(case)
    assert config.model.sliding_window == 9
    assert kv_cache_bytes(config, 2, 40) == kv_cache_bytes(config, 2, 9) == [4 * 2 * 2 * 4 * 9 * 8 * 4]
