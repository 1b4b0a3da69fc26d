"""A whole generation of one rank: what it does in phases, what enters and leaves, and what it says of either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from helpers import MACHINE, agree, make_config

from harness.prompts import Prompt, load_tokenizer, read_prompts
from harness.record.heartbeat import Heart
from harness.record.store import Attempt
from harness.run.inference.generation import WARM_UP_TOKENS, Generation
from harness.run.inference.requests import Requests
from harness.run.inference.texts import Texts
from harness.spec.config import RunConfig

BYTES = load_tokenizer("bytes", "")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(before)


def configure(**values: Any) -> RunConfig:
    config = make_config("task=generate", "model=gpt2_tiny")
    return config.model_copy(update={"generate": config.generate.model_copy(update={"prompt_length": 9, **values})})


def build(folder: Path, config: RunConfig, prompts: list[Prompt] | None = None) -> tuple[Generation, Requests, Attempt]:
    attempt = Attempt(folder / "attempt-1")
    attempt.path.mkdir()
    attempt.spans_file(0).parent.mkdir()
    requests = Requests(prompts or read_prompts(config.generate, config.model, BYTES), [])
    generation = Generation(attempt, config, 0, requests, MACHINE, Heart(attempt.path, 0))
    return generation, requests, attempt


@pytest.mark.parametrize("new", [1, 2, 5])
def test_random_prompts_are_computed_in_two_phases(tmp_path: Path, new: int) -> None:
    """Three prompts of 9 tokens in chunks of 4; again, and with what is no measurement before."""
    config = configure(num_requests=3, max_new_tokens=new, prefill_chunk=4)
    generation, _, _ = build(tmp_path, config)
    assert generation.num_slots == 3
    generation.warm_up()
    passes = generation.ring.num_passes
    assert passes == 3 + min(new, WARM_UP_TOKENS) - 1
    for number in (1, 2):
        record = generation.run(None)
        assert record is not None
        assert record.prefill is not None
        assert (record.number, record.tokens, record.prefill.tokens) == (number, 3 * new, 27)
        assert len(record.first_token_seconds) == len(record.queue_seconds) == 3
        assert all(
            0 <= queue < first for queue, first in zip(record.queue_seconds, record.first_token_seconds, strict=True)
        )
        assert max(record.first_token_seconds) <= record.prefill.seconds
        assert len(record.inter_token_seconds) == 3 * max(0, new - 2)
        assert generation.ring.num_passes == passes + number * (3 + new - 1)
        if new == 1:
            assert record.decode is None
            continue
        assert record.decode is not None
        assert record.decode.tokens == 3 * (new - 1)
        assert record.seconds == record.prefill.seconds + record.decode.seconds
        assert record.decode.bubbles is not None
        assert record.decode.bubbles.simulated == 0, "of one stage"
    assert generation.predicted_cache_bytes == [generation.stage.num_cache_bytes]
    generation.meter.close()


def test_requests_at_a_rate_enter_and_leave(tmp_path: Path) -> None:
    config = configure(num_requests=7, batch_size=2, max_new_tokens=3, request_rate=200.0)
    generation, _, _ = build(tmp_path, config)
    assert generation.num_slots == 2
    record = generation.run(None)
    assert record is not None
    assert (record.tokens, record.prefill, record.decode) == (21, None, None)
    assert len(record.first_token_seconds) == len(record.queue_seconds) == 7
    assert len(record.inter_token_seconds) == 14
    assert min(record.queue_seconds) >= 0
    assert record.seconds >= max(record.first_token_seconds)
    generation.meter.close()


def test_given_prompts_become_lines(tmp_path: Path) -> None:
    """Of more prompts than places, one of which is of no use; each as it is on its own."""
    given = [Prompt("abc", [97, 98, 99]), Prompt("", [], "it is empty"), Prompt("d", [100]), Prompt("ef", [101, 102])]
    found = []
    for size in (1, 2):
        config = configure(prompts_file="given", batch_size=size, max_new_tokens=4, temperature=1.0)
        (folder := tmp_path / str(size)).mkdir()
        generation, requests, attempt = build(folder, config, given)
        texts = Texts(attempt, config.generate, requests, BYTES)
        record = generation.run(texts)
        texts.close()
        generation.meter.close()
        assert record is not None
        assert (record.tokens, record.prefill) == (12, None)
        lines = [json.loads(line) for line in attempt.generated_file.read_text().splitlines()]
        found.append({line["number"]: line["tokens"] for line in lines})
        assert [line["finish_reason"] for line in lines] == ["error: it is empty", "length", "length", "length"]
        assert all(0 < line["seconds"] <= record.seconds + 1 for line in lines[1:])
    assert found[0] == found[1]
    assert {number: len(tokens) for number, tokens in found[0].items()} == {0: 4, 1: 0, 2: 4, 3: 4}


def test_two_emulated_stages_take_what_the_ring_says(tmp_path: Path) -> None:
    """Eight prompts one by one and five tokens each in two groups, two stages of 30 ms, by closed formulas.

    The k-th prompt's token is chosen after k + 2 passes, though rank 0 looks at it when all have begun.
    """
    overrides = [
        "model=emulated", "model.num_hidden_layers=2", "model.forward_seconds=0.03", "parallel.pp=2",
        "generate.batch_size=8", "generate.prefill_batch_size=1", "generate.max_new_tokens=5",
    ]  # fmt: skip

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        answer = run_ranks(2, "ranks_generation_run", overrides, folder)
        assert [(found["prefill"], found["decode"]) for found in answer] == [(8, 8)] * 3
        best = min((found["record"] for found in answer), key=lambda record: record["seconds"])
        assert best["peak_memory_bytes"] == 1001
        for phase in (best["prefill"], best["decode"]):
            assert 9 * 0.03 <= phase["seconds"] < 9 * 0.03 + 0.05
            bubbles = phase["bubbles"]
            assert 1 / 9 - 0.02 < bubbles["measured"] < 1 / 9 + 0.06
            assert abs(bubbles["measured"] - bubbles["simulated"]) < 0.02
        expected = [0.03 * (k + 2) for k in range(8)]
        assert sorted(best["first_token_seconds"]) == pytest.approx(expected, abs=0.04)
        assert sorted(best["first_token_seconds"])[2] < 7 * 0.03
        assert min(best["inter_token_seconds"]) >= 2 * 0.03 - 0.01

    agree(check)
