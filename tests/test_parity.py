"""Every layout with every option computes the training of one rank.

The full product of layouts and options has thousands of rows. Here stand all pairs of option values, every
layout being one of the options, so that each layout meets each option at least once (allpairspy, a greedy
covering array), and besides the plain grid tp, pp, dp in {1, 2} with micro-batches of 1 and 2. All layouts of one
number of ranks share a launch: their engines are built one after the other in one process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from allpairspy import AllPairs
from distributed import run_ranks

from harness.spec.schedules import SCHEDULES

LAYOUTS = [
    (tp, pp, dp) for tp, pp, dp in product((1, 2, 4), (1, 2, 4), (1, 2)) if tp * pp * dp <= 8
]  # more than 8 ranks are beyond a test on two cores
OPTIONS: dict[str, list[list[str]]] = {
    "model": [
        ["model=gpt2_tiny"],
        ["model=gpt2_tiny", "model.tie_word_embeddings=false"],
        ["model=llama_tiny", "model.tie_word_embeddings=true"],
        ["model=llama_tiny"],
    ],
    "precision": [
        ["train.precision=fp32", "model.onednn=false"],
        ["train.precision=fp32", "model.onednn=true"],
        ["train.precision=bf16"],
    ],
    "zero": [["parallel.zero_stage=0"], ["parallel.zero_stage=1"]],
    "checkpointing": [["train.activation_checkpointing=none"], ["train.activation_checkpointing=full"]],
    "micro_batch": [["train.micro_batch_size=1"], ["train.micro_batch_size=2"]],
    "partition": [[f"parallel.partition={kind}"] for kind in ("uniform", "parameters", "cost", "LISTED")],
    "vocabulary": [["model.vocab_size=64"], ["model.vocab_size=67"]],  # 67 divides by no tp
    "sequence": [  # sliced, a length must divide by tp
        ["train.sequence_length=12", "parallel.sequence_parallel=false"],
        ["train.sequence_length=13", "parallel.sequence_parallel=false"],
        ["train.sequence_length=12", "parallel.sequence_parallel=true"],
    ],
    "kv_heads": [[f"model.num_key_value_heads={heads}"] for heads in (4, 2, 1)],  # fewer than tp, too
    "clipping": [["train.gradient_clipping=0"], ["train.gradient_clipping=0.3"]],  # norms are about 1
    "dropout": [["model.dropout=0.0"], ["model.dropout=0.2"]],
    "transport": [["parallel.shared_memory=true"], ["parallel.shared_memory=false"]],
}
BLOCKS = {1: 3, 2: 3, 4: 5}
"""By pp: no even share."""
LISTED = {1: "[3]", 2: "[1,2]", 4: "[1,2,1,1]"}
MICRO_BATCHES = {1: 2, 2: 3, 4: 5}
"""By pp: the first stage begins one more than it holds at once, between two backward passes."""

Row = tuple[tuple[int, int, int], list[str]]


def is_comparable(row: list[Any]) -> bool:
    """Whether one rank can draw the same masks: tensor-parallel ranks draw those of their heads."""
    return row[0][0] == 1 or OPTIONS["dropout"][1] not in row


def all_pairs() -> list[list[Any]]:
    """A covering array of all pairs of layouts and option values."""
    return [list(row) for row in AllPairs([LAYOUTS, *OPTIONS.values()], filter_func=is_comparable)]


def plain_rows() -> list[Row]:
    """tp, pp, dp in {1, 2}, micro-batches of 1 and 2."""
    return [
        (layout, overrides_of(layout, [[f"train.micro_batch_size={size}"]], size))
        for layout in product((1, 2), repeat=3)
        for size in (1, 2)
    ]


def paired_rows() -> list[Row]:
    """The rows of `all_pairs` as overrides."""
    rows = []
    for layout, *choices in all_pairs():
        chosen = dict(zip(OPTIONS, choices, strict=True))
        size = int(chosen["micro_batch"][0][-1])
        rows.append((layout, overrides_of(layout, list(chosen.values()), size)))
    return rows


def fp16_rows() -> list[Row]:
    """Few layouts, as CPUs have no use for fp16; a loss scale of 2^24 overflows until it has been halved often."""
    changes = {
        (1, 1, 1): ["deepspeed.fp16.initial_scale_power=24"],
        (2, 1, 1): ["parallel.sequence_parallel=true"],
        (1, 2, 1): [],
        (1, 1, 2): ["model=llama_tiny", "model.num_key_value_heads=2"],
    }
    common = ["train.precision=fp16", "parallel.zero_stage=1"]
    return [(layout, overrides_of(layout, [common, change], 1)) for layout, change in changes.items()]


def emulated_rows() -> list[Row]:
    """Blocks that wait have a parameter of their own."""
    waits = ["model=emulated", "model.forward_seconds=0", "model.backward_seconds=0"]
    return [((1, 2, 1), overrides_of((1, 2, 1), [waits], 1))]


def shared_masks_rows() -> list[Row]:
    """Tensor-parallel ranks with dropout: not what one rank computes, but what they hold alike must stay alike."""
    return [((2, 1, 1), overrides_of((2, 1, 1), [["model.dropout=0.2"]], 1))]


def engine_rows() -> list[Row]:
    """torch's own pipelines, tensor and data parallelism, with the options that each has to do something for."""
    tied, llama = ["model=gpt2_tiny", "model.vocab_size=67"], ["model=llama_tiny", "model.num_key_value_heads=2"]
    full, masks = ["train.activation_checkpointing=full"], ["model.dropout=0.2"]
    rows = []
    for pp, model, schedule, others in [
        (2, tied, "gpipe", [masks, ["train.gradient_clipping=0"]]),
        (2, llama, "1f1b", [full, ["parallel.partition=[2,1]"]]),
        (2, tied, "interleaved", [masks, full, ["parallel.partition=[1,2,1,1]"]]),
        (2, tied, "zb_v", [masks]),
        (2, llama, "dualpipev", []),
        (4, tied, "1f1b", [masks]),
        (4, tied, "zb_v", []),
    ]:
        own = ["parallel.engine=torch", f"parallel.schedule={schedule}", f"train.global_batch_size={pp * 4}"]
        blocks = [f"model.num_hidden_layers={pp * 2 + 1}"] if SCHEDULES[schedule].num_chunks > 1 else []
        rows.append(((1, pp, 1), [*overrides_of((1, pp, 1), [model, *others], 2), *own, *blocks]))
    waits = ["model=emulated", "model.forward_seconds=0", "model.backward_seconds=0", "model.stage_factors=[1,2]"]
    rows.append(((1, 2, 1), overrides_of((1, 2, 1), [waits, ["parallel.engine=torch"]], 1)))
    for tp, others in [(2, [tied, full]), (2, [llama]), (4, [tied, ["model.tie_word_embeddings=false"]])]:
        rows.append(((tp, 1, 1), overrides_of((tp, 1, 1), [["parallel.engine=dtensor"], *others], 2)))
    # Families whose layers are others, and documents.
    bert, encoder = ["model=bert_tiny"], ["model=encoder_tiny", "train.objective=causal"]
    window = ["model=llama_tiny", "model.family=mistral", "model.sliding_window=5"]
    norms, packed = ["model=llama_tiny", "model.family=qwen3"], ["data.documents=packed"]
    for model, others in [(bert, [packed, masks]), (norms, []), (window, [full]), (encoder, [packed, full])]:
        rows.append(((1, 2, 1), overrides_of((1, 2, 1), [["parallel.engine=torch"], model, *others], 2)))
        rows.append(((1, 1, 2), overrides_of((1, 1, 2), [["parallel.engine=ddp"], model, *others], 2)))
    wide = ["model=llama_tiny", "model.family=mistral", "model.sliding_window=16"]
    for model in (wide, ["model=llama_tiny", "model.family=qwen2"]):
        rows.append(((2, 1, 1), overrides_of((2, 1, 1), [["parallel.engine=dtensor"], model], 2)))
    for dp, others in [(2, [tied, masks]), (4, [llama, full])]:
        rows.append(((1, 1, dp), overrides_of((1, 1, dp), [["parallel.engine=ddp"], *others], 2)))
    return rows


SCHEDULE_OPTIONS: dict[str, list[list[str]]] = {
    "model": OPTIONS["model"],
    "precision": OPTIONS["precision"],
    "zero": OPTIONS["zero"],
    "checkpointing": OPTIONS["checkpointing"],
    "partition": [["parallel.partition=uniform"], ["parallel.partition=LISTED"]],
    "sequence": OPTIONS["sequence"][1:],
    "dropout": OPTIONS["dropout"],
}
PIPELINES = [layout for layout in LAYOUTS if layout[1] > 1]


def all_schedule_pairs() -> list[list[Any]]:
    """A covering array of all pairs of pipelines, schedules and option values."""
    names = [name for name in SCHEDULES if name != "1f1b"]
    rows = [list(row) for row in AllPairs([PIPELINES, names, *SCHEDULE_OPTIONS.values()], filter_func=is_comparable)]
    met = [row[:2] for row in rows]
    for layout, name in product(PIPELINES, names):  # the greedy search overlooks some
        if [layout, name] not in met:
            rows.append([layout, name, *next(options for (tp, *_), _, *options in rows if tp == layout[0])])
    return rows


def schedule_rows() -> list[Row]:
    """Their overrides: a block more than the schedule has parts, and as few micro-batches as fill it."""
    rows = []
    for layout, name, *choices in all_schedule_pairs():
        _, pp, dp = layout
        chunks = SCHEDULES[name].num_chunks
        listed = f"[{','.join(['2', *'1' * (pp * chunks - 1)])}]"
        changes = [override.replace("LISTED", listed) for choice in choices for override in choice]
        num_micro_batches = 2 * pp if chunks > 1 else pp + 1
        sizes = [f"model.num_hidden_layers={pp * chunks + 1}", f"train.global_batch_size={dp * num_micro_batches}"]
        own = [f"parallel.schedule={name}", "train.micro_batch_size=1", *sizes]
        rows.append((layout, [*overrides_of(layout, [changes], 1), *own]))
    return rows


def is_wrong(overrides: list[str], comparison: dict[str, Any]) -> bool:
    """Outside its tolerance or, with masks of tensor-parallel ranks, not a number: the mark of copies that differ."""
    comparable = not {"model.dropout=0.2", "parallel.tp=2"} <= {*overrides}
    return not comparison["passed"] if comparable else math.isnan(comparison["error"])


def overrides_of(layout: tuple[int, int, int], choices: list[list[str]], micro_batch_size: int) -> list[str]:
    tp, pp, dp = layout
    return [
        *(override.replace("LISTED", LISTED[pp]) for choice in choices for override in choice),
        f"parallel.tp={tp}",
        f"parallel.pp={pp}",
        f"parallel.dp={dp}",
        f"model.num_hidden_layers={BLOCKS[pp]}",
        f"train.global_batch_size={micro_batch_size * dp * MICRO_BATCHES[pp]}",
    ]


PARTS: dict[str, tuple[Callable[[], list[Row]], ...]] = {
    "pairs": (paired_rows,),
    "others": (plain_rows, fp16_rows, emulated_rows, shared_masks_rows, engine_rows),
    "schedules": (schedule_rows,),
}
PARTS["all"] = PARTS["pairs"] + PARTS["others"]
ONE_VARIANT = {"schedules": "AdamW"}
"""What the optimizer makes of gradients does not depend on the order in which they came to be."""


@pytest.mark.parametrize(
    ("world_size", "part"),
    [
        pytest.param(1, "all", id="1"),
        pytest.param(2, "others", id="2"),
        pytest.param(2, "pairs", id="2 pairs", marks=pytest.mark.slow),
        pytest.param(4, "all", id="4", marks=pytest.mark.slow),
        pytest.param(8, "all", id="8", marks=pytest.mark.slow),
        *(pytest.param(n, "schedules", id=f"{n} schedules", marks=pytest.mark.slow) for n in (2, 4, 8)),
    ],
)
def test_parity(world_size: int, part: str, tmp_path: Path) -> None:
    every = [row for rows in PARTS[part] for row in rows()]
    rows = [row for row in every if row[0][0] * row[0][1] * row[0][2] == world_size]
    argument = {"rows": [overrides for _, overrides in rows], "variant": ONE_VARIANT.get(part, "")}
    answers = run_ranks(world_size, "ranks_parity", argument, tmp_path, timeout=1800)
    failures = [
        f"{' '.join(overrides)}\n    {comparison}"
        for (_, overrides), comparisons in zip(rows, answers, strict=True)
        for comparison in comparisons
        if is_wrong(overrides, comparison)
    ]
    assert not failures, "\n".join(failures)


def test_every_schedule_meets_every_pipeline_and_option() -> None:
    names = [name for name in SCHEDULES if name != "1f1b"]
    factors: list[list[Any]] = [PIPELINES, names, *SCHEDULE_OPTIONS.values()]
    rows = all_schedule_pairs()
    for other in (0, *range(2, len(factors))):
        for name, value in product(names, factors[other]):
            assert any(row[1] == name and row[other] == value for row in rows), (name, value)


def test_every_layout_meets_every_option() -> None:
    rows = paired_rows()
    for layout, (name, values) in product(LAYOUTS, OPTIONS.items()):
        for value in values:
            if not is_comparable([layout, value]):
                continue
            wanted = {override.replace("LISTED", LISTED[layout[1]]) for override in value}
            assert any(row == layout and wanted <= {*chosen} for row, chosen in rows), (layout, name, value)


def test_pairs_cover_all_pairs() -> None:
    rows = all_pairs()
    factors: list[list[Any]] = [LAYOUTS, *OPTIONS.values()]
    for i, j in product(range(len(factors)), repeat=2):
        for a, b in product(factors[i], factors[j]):
            if i < j and is_comparable([a, b]):
                assert any(row[i] == a and row[j] == b for row in rows)
