"""Every family computes the training of one rank, in every layout and with all that touches its own layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from allpairspy import AllPairs
from distributed import run_ranks
from test_parity import LAYOUTS, OPTIONS, Row, is_comparable, is_wrong, overrides_of

from harness.spec.families import FAMILIES
from harness.spec.schedules import SCHEDULES

FAMILY_OPTIONS: dict[str, list[list[str]]] = {
    "model": [
        ["model=encoder_tiny"],
        ["model=encoder_tiny", "train.objective=causal", "model.tie_word_embeddings=false"],
        ["model=bert_tiny"],
        ["model=bert_tiny", "train.objective=causal"],
        ["model=llama_tiny", "model.family=mistral", "model.sliding_window=5", "model.num_key_value_heads=2"],
        ["model=llama_tiny", "model.family=qwen2", "model.num_key_value_heads=1"],
        ["model=llama_tiny", "model.family=qwen3", "model.num_key_value_heads=1"],
        ["model=llama_tiny", "model.family=qwen3", "model.num_key_value_heads=4", "model.tie_word_embeddings=true"],
        ["model=gpt2_tiny"],
        ["model=llama_tiny"],
    ],
    "schedule": [[f"parallel.schedule={name}"] for name in SCHEDULES],
    "precision": [["train.precision=fp32"], ["train.precision=bf16"]],
    "zero": OPTIONS["zero"],
    "checkpointing": OPTIONS["checkpointing"],
    "partition": [[f"parallel.partition={kind}"] for kind in ("uniform", "parameters", "cost")],
    "vocabulary": OPTIONS["vocabulary"],
    "sequence": OPTIONS["sequence"][1:],
    "dropout": OPTIONS["dropout"],
    "documents": [["data.documents=cut"], ["data.documents=padded"], ["data.documents=packed"]],
}
FAMILY_LAYOUTS = [layout for layout in LAYOUTS if math.prod(layout) <= 4]


def is_family_row(row: list[Any]) -> bool:
    """As far as a row is filled: only pipelines have chunks, and one rank can draw the masks."""
    layout, schedule = row[0], row[2][0].partition("=")[2] if len(row) > 2 else "1f1b"
    return is_comparable(row) and (layout[1] > 1 or SCHEDULES[schedule].num_chunks == 1)


def all_family_pairs() -> list[list[Any]]:
    """A covering array of all pairs of layouts, models and option values."""
    factors: list[list[Any]] = [FAMILY_LAYOUTS, *FAMILY_OPTIONS.values()]
    rows = [list(row) for row in AllPairs(factors, filter_func=is_family_row)]
    pipeline, simple = (1, 2, 1), [values[0] for values in factors[3:]]
    for model in FAMILY_OPTIONS["model"]:  # the greedy search overlooks some
        met = [row for row in rows if row[1] == model]
        missing = [layout for layout in FAMILY_LAYOUTS if layout not in [row[0] for row in met]]
        rows += [[layout, model, ["parallel.schedule=1f1b"], *simple] for layout in missing]
        unmet = [schedule for schedule in FAMILY_OPTIONS["schedule"] if schedule not in [row[2] for row in met]]
        rows += [[pipeline, model, schedule, *simple] for schedule in unmet]
    return rows


def family_rows() -> list[Row]:
    """Their overrides."""
    rows = []
    for layout, *choices in all_family_pairs():
        _, pp, dp = layout
        chunks = SCHEDULES[choices[1][0].partition("=")[2]].num_chunks
        num_micro_batches = 2 * pp if chunks > 1 else pp + 1
        sizes = [f"model.num_hidden_layers={pp * chunks + 1}", f"train.global_batch_size={dp * num_micro_batches}"]
        rows.append((layout, [*overrides_of(layout, choices, 1), *sizes]))
    return rows


def family_of(overrides: list[str]) -> str:
    """What a row of families trains, by the last word on it."""
    known = {"gpt2_tiny": "gpt2", "llama_tiny": "llama", "bert_tiny": "bert", "encoder_tiny": "encoder"}
    names = [override.partition("=")[2] for override in overrides if override.startswith(("model=", "model.family="))]
    return known.get(names[-1], names[-1])


@pytest.fixture(scope="module")
def family_answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Row, list[dict[str, Any]]]]:
    """Of every row of families; one launch for each number of ranks."""
    answers = []
    for world_size in (1, 2, 4):
        rows = [row for row in family_rows() if math.prod(row[0]) == world_size]
        argument = {"rows": [overrides for _, overrides in rows], "variant": "AdamW"}
        found = run_ranks(world_size, "ranks_parity", argument, tmp_path_factory.mktemp("ranks"), timeout=1800)
        answers += zip(rows, found, strict=True)
    return answers


FAMILY_NAMES = [name for name, family in FAMILIES.items() if family.computes]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["layout", *(name for name in FAMILY_OPTIONS if name != "model")])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_families(family_answers: list[tuple[Row, list[dict[str, Any]]]], family: str, option: str) -> None:
    """A family meets every value of an option, and with each computes the training of one rank."""
    own = [(layout, {*row}, found) for (layout, row), found in family_answers if family_of(row) == family]
    values: list[Any] = FAMILY_LAYOUTS if option == "layout" else FAMILY_OPTIONS[option]
    for value in values:
        wanted = set[str]() if option == "layout" else {*value}
        met = [(row, found) for layout, row, found in own if wanted <= row and (wanted or layout == value)]
        assert met, value
        wrong = [(sorted(row), c) for row, found in met for c in found if is_wrong(list(row), c)]
        assert not wrong, wrong
