"""Every family learns, and goes on from a checkpoint in another layout, with documents of every kind; one launch."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

from harness.spec.families import FAMILIES

STEPS, HALF = 12, 6
COMMON = [
    "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.intermediate_size=48", "model.vocab_size=257", "model.max_position_embeddings=32",
    "train.sequence_length=24", "train.micro_batch_size=4", "train.global_batch_size=16", f"train.steps={STEPS}",
    "train.learning_rate=0.02", "train.learning_rate_warmup_steps=2", f"train.eval_interval={HALF}",
    "train.eval_samples=8",
]  # fmt: skip
FAMILY = {
    "gpt2": ["model=gpt2_tiny"],
    "llama": ["model=llama_tiny", "model.num_key_value_heads=2"],
    "mistral": ["model=llama_tiny", "model.family=mistral", "model.sliding_window=6"],
    "qwen2": ["model=llama_tiny", "model.family=qwen2", "model.num_key_value_heads=1"],
    "qwen3": ["model=llama_tiny", "model.family=qwen3", "model.num_key_value_heads=1"],
    "bert": ["model=bert_tiny"],
    "encoder": ["model=encoder_tiny"],
}
DOCUMENTS = ("cut", "padded", "packed")
FIRST, THEN = ("parallel.tp=2", "parallel.pp=2")
"""Layouts before and after a checkpoint."""
WHO, WHAT = (
    ("cat", "dog", "hen", "rat", "cow", "pig"),
    ("sat", "ran", "ate a lot", "slept all day", "is gone", "is at home"),
)
"""Of the texts, of 8 to 20 letters."""
CASES = [(family, documents) for family in FAMILY for documents in DOCUMENTS]


def test_every_family_that_computes_is_among_them() -> None:
    assert set(FAMILY) == {name for name, family in FAMILIES.items() if family.computes}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    texts = folder / "texts"
    texts.mkdir()
    for number, (who, what) in enumerate(product(WHO, WHAT)):
        (texts / f"{number:02}.txt").write_text(f"a {who} {what}")
    runs = []
    for family, documents in CASES:
        name = f"{family} {documents}"
        own = [*FAMILY[family], *COMMON, f"data.documents={documents}", f"data.path='{texts}'"]
        checkpoint = f"train.checkpoint_interval={HALF}"
        resume = f"train.resume='{folder / f'{name} first' / 'checkpoints' / f'step-{HALF:08d}'}'"
        runs += [(f"{name} first", [*own, FIRST, checkpoint]), (f"{name} then", [*own, THEN, resume])]
    answers = run_ranks(2, "ranks_train", {"runs": runs}, folder)
    return {name: answer for (name, _), answer in zip(runs, answers, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "documents"), CASES)
def test_it_learns(curves: dict[str, list[dict[str, Any]]], family: str, documents: str) -> None:
    """From log(257) = 5.5, or worse where embeddings are wide, to what some letters take."""
    lines = curves[f"{family} {documents} first"]
    losses = [line["train/loss"] for line in lines]
    assert len(losses) == STEPS
    assert 5.3 < losses[0] < 12
    assert max(losses[-3:]) < 4.2
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert len(held_out) == STEPS // HALF
    assert max(held_out) < 4.7
    tokens = [line.get("data/tokens") for line in lines]
    assert all(token is None for token in tokens) if documents == "cut" else all(0 < t < 16 * 24 for t in tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "documents"), CASES)
def test_it_goes_on_in_another_layout(curves: dict[str, list[dict[str, Any]]], family: str, documents: str) -> None:
    whole, rest = (curves[f"{family} {documents} {part}"] for part in ("first", "then"))
    assert [line["step"] for line in rest] == list(range(HALF + 1, STEPS + 1))
    for key, bound in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
        assert [line[key] for line in rest] == pytest.approx([line[key] for line in whole[HALF:]], rel=bound), key
    assert rest[-1]["eval/loss"] == pytest.approx(whole[-1]["eval/loss"], rel=1e-5)
