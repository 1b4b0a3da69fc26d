"""Checkpoints: what is in them, going on from them in any layout, and what happens when something goes wrong."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from distributed import run_ranks, start_ranks
from helpers import MACHINE, compose_raw, make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from harness.checkpoints import FileRecord, Meta, SavedConfig, checksum, directory_of, find_checkpoint
from harness.corpus import Corpus
from harness.errors import ConfigError
from harness.launch.points import data_identity
from harness.launch.train import main
from harness.model.groups import TensorParallel
from harness.model.loss import IGNORE_INDEX
from harness.model.weights import shard
from harness.record.store import read_json, read_jsonl, write_json
from harness.run.checkpoint import boxes_of, check_tensors, rectangles, tensor_shapes
from harness.run.data import HeldOutSamples
from harness.spec.config import RunConfig
from harness.spec.identity import identity
from harness.spec.parameters import parameter_table
from harness.spec.resolve import load_config

TINY = [
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.vocab_size=257",  # divides by no tp
    "model.intermediate_size=48",
    "model.max_position_embeddings=16",
    "train.sequence_length=12",
    "train.global_batch_size=4",
]
LAYOUTS = {"tp": "parallel.tp=2", "pp": "parallel.pp=2", "dp": "parallel.dp=2"}
Lines = list[dict[str, Any]]


# --- what of a parameter is where


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 12))
@settings(deadline=None)
def test_rectangles_are_a_range_in_order(start: int, length: int, width: int) -> None:
    found = list(rectangles(start, start + length, width))
    assert len(found) <= 3
    positions = [
        (row + r) * width + column + c
        for row, column, rows, columns in found
        for r in range(rows)
        for c in range(columns)
    ]
    assert positions == list(range(start, start + length))


@pytest.mark.parametrize("model", ["gpt2_tiny", "llama_tiny"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_slices_of_all_ranks_make_up_the_tensors(model: str, tp_size: int, num_replicas: int) -> None:
    """Each rank's slice of each parameter, cut into pieces as ZeRO does."""
    config = make_config(*TINY, f"model={model}", "model.num_key_value_heads=2")
    shapes = tensor_shapes(config)
    covered = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("weight/")}
    built = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("weight/")}
    fused = {}
    for spec in parameter_table(config.model).values():
        fused[spec.name] = torch.randn(spec.shape)
        for rank in range(tp_size):
            local = shard(fused[spec.name], spec, rank, tp_size).reshape(-1)
            cuts = [len(local) * k // num_replicas for k in range(num_replicas + 1)]
            for start, stop in pairwise(cuts):
                tp = TensorParallel(None, rank, tp_size, None, 1)
                for box in boxes_of(spec, tp, start, local[start:stop]):
                    place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.data.shape, strict=True))
                    built[f"weight/{box.name}"][place] = box.data
                    covered[f"weight/{box.name}"][place] += tp_size if spec.shard_dim is not None else 1
    assert all((count == tp_size).all() for count in covered.values())
    for name, whole in fused.items():
        parts = [built[f"weight/{part}"] for part in part_names(name, set(shapes))]
        assert torch.equal(torch.cat(parts), whole)


def part_names(name: str, tensors: set[str]) -> list[str]:
    if f"weight/{name}" in tensors and ".mlp.up" not in name:
        return [name]
    block, layer, kind = name.rsplit(".", 2)
    parts = {"qkv": ["q", "k", "v"], "up": ["gate", "up"]}[layer]
    return [part for part in (f"{block}.{p}.{kind}" for p in parts) if f"weight/{part}" in tensors]


# --- going on in the same and in another layout


FOUR_BLOCKS = "model.num_hidden_layers=4"
ORIGINS = {
    "tp": [LAYOUTS["tp"]],
    "dp zero": [LAYOUTS["dp"], "parallel.zero_stage=1"],
    "pp bf16 zero": [LAYOUTS["pp"], "train.precision=bf16", "parallel.zero_stage=1"],
    "dp bf16 llama": [LAYOUTS["dp"], "train.precision=bf16", "model=llama_tiny"],
    "pp sgd untied": [LAYOUTS["pp"], "train.optimizer=sgd", "model.tie_word_embeddings=false"],
    "pp dropout": [LAYOUTS["pp"], "model.dropout=0.1"],
    "1f1b": [LAYOUTS["pp"], FOUR_BLOCKS, "parallel.schedule=1f1b"],
    "zb_v": [LAYOUTS["pp"], FOUR_BLOCKS, "parallel.schedule=zb_v"],
    "interleaved bf16 zero": [
        LAYOUTS["pp"], FOUR_BLOCKS, "parallel.schedule=interleaved", "train.precision=bf16", "parallel.zero_stage=1"
    ],
}  # fmt: skip
COPIES = {
    "tp": [LAYOUTS["tp"]],
    "pp": [LAYOUTS["pp"], "parallel.partition=[1,1]"],
    "dp zero": [LAYOUTS["dp"], "parallel.zero_stage=1"],
    "dp bf16 zero": [LAYOUTS["dp"], "train.precision=bf16", "parallel.zero_stage=1"],
    "tp bf16": [LAYOUTS["tp"], "train.precision=bf16"],
}
SCHEDULES = {name: f"parallel.schedule={name}" for name in ("1f1b", "zb_v", "interleaved", "zb_h1")}
MOVES = [(origin, layout) for origin in ("tp", "dp zero") for layout in LAYOUTS if layout not in origin]
MOVES += [("1f1b", "zb_v"), ("zb_v", "1f1b"), ("zb_v", "interleaved"), ("zb_v", "zb_h1")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the attempts of `runs`, by name."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Lines]:
    """Lines of metrics.jsonl of runs in one process group.

    `ORIGIN` is a whole run, `ORIGIN>LAYOUT` goes on from its checkpoint, and `tp=LAYOUT` is a copy of that.
    """
    common = [*TINY, "train.steps=6", "train.checkpoint_interval=3", "train.eval_interval=3", "train.eval_samples=5"]
    named = {name: [*common, *chosen] for name, chosen in ORIGINS.items()}
    named["tp without evaluation"] = [*named["tp"], "train.eval_interval=0", "train.keep_checkpoints=1"]
    resume = {name: f"train.resume={directory_of(folder / name / 'checkpoints', 3)}" for name in ORIGINS}
    again = {f"{name}>same": [*named[name], resume[name]] for name in ORIGINS}
    moved = {
        f"{name}>{other}": [*(o for o in named[name] if o not in kind.values()), kind[other], resume[name]]
        for name, other in MOVES
        for kind in (LAYOUTS, SCHEDULES)
        if other in kind
    }
    copies = {f"tp={name}": [*common, *options, resume["tp"]] for name, options in COPIES.items()}
    copies["dp zero=pp"] = [*common, LAYOUTS["pp"], resume["dp zero"]]
    chosen = named | again | moved
    lines = run_ranks(2, "ranks_train", {"runs": list(chosen.items()), "copies": list(copies.items())}, folder)
    return dict(zip(chosen, lines, strict=True))


def curve(lines: Lines, first_step: int = 1) -> list[tuple[Any, ...]]:
    keys = ("step", "train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/perplexity")
    return [tuple(line.get(key) for key in keys) for line in lines if line["step"] >= first_step]


def assert_same_tensors(run: Path, other: Path, step: int) -> None:
    """Bit by bit, as torch's own tool reads them."""
    tensors = []
    for path in (run, other):
        dcp_to_torch_save(directory_of(path / "checkpoints", step), path / "all.pt")
        tensors.append(torch.load(path / "all.pt"))
    assert set(tensors[0]) == set(tensors[1])
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("origin", ORIGINS)
def test_same_layout_goes_on_bit_by_bit(runs: dict[str, Lines], folder: Path, origin: str) -> None:
    assert curve(runs[f"{origin}>same"]) == curve(runs[origin], first_step=4)
    assert_same_tensors(folder / f"{origin}>same", folder / origin, step=6)


@pytest.mark.parametrize("layout", COPIES)
def test_every_layout_reads_and_writes_the_same(runs: dict[str, Lines], folder: Path, layout: str) -> None:
    assert_same_tensors(folder / f"tp={layout}", folder / "tp", step=3)


def test_what_zero_wrote_is_read_without_it(runs: dict[str, Lines], folder: Path) -> None:
    assert_same_tensors(folder / "dp zero=pp", folder / "dp zero", step=3)


@pytest.mark.parametrize(("origin", "layout"), MOVES)
def test_another_layout_goes_on_to_rounding(runs: dict[str, Lines], origin: str, layout: str) -> None:
    resumed, original = curve(runs[f"{origin}>{layout}"]), curve(runs[origin], first_step=4)
    assert [line[0] for line in resumed] == [4, 5, 6]
    for mine, theirs in zip(resumed, original, strict=True):
        assert mine[:3] == pytest.approx(theirs[:3], rel=1e-6)
        assert mine[3] == pytest.approx(theirs[3], rel=1e-5)


def test_evaluation_is_the_same_in_every_layout_and_schedule(runs: dict[str, Lines]) -> None:
    for names in (("tp", "tp>pp", "tp>dp", "dp zero"), ("1f1b", "zb_v", "zb_v>interleaved")):
        losses = [runs[name][-1]["eval/loss"] for name in names]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_evaluation_leaves_training_alone(runs: dict[str, Lines]) -> None:
    evaluated, other = runs["tp"], runs["tp without evaluation"]
    assert [line["step"] for line in evaluated if "eval/loss" in line] == [3, 6]
    assert all(line["eval/perplexity"] == math.exp(line["eval/loss"]) for line in evaluated[2::3])
    assert [line[:4] for line in curve(evaluated)] == [line[:4] for line in curve(other)]


def test_outdated_checkpoints_go(runs: dict[str, Lines], folder: Path) -> None:
    kept = {name: sorted(path.name for path in (folder / name / "checkpoints").iterdir()) for name in runs}
    assert kept["tp"] == ["step-00000003", "step-00000006"]
    assert kept["tp without evaluation"] == ["step-00000006"]


@pytest.mark.parametrize("num_tokens", [26, 600, 100_000])
def test_held_out_samples(tmp_path: Path, num_tokens: int) -> None:
    config = make_config(*TINY, "train.eval_samples=5")
    numpy.save(tmp_path / "tokens.npy", numpy.arange(num_tokens, dtype=numpy.uint32))
    corpus = Corpus(tmp_path / "tokens.npy", num_tokens, "uint32", "", "")
    training, held_out = corpus.ranges(12)
    samples = HeldOutSamples(config, corpus)
    drawn = [samples.sample(0, number) for number in range(5)]
    assert drawn[0].inputs[0] == held_out.start == training.stop
    assert drawn[-1].targets[-1] == num_tokens - 1
    assert all((row.inputs == numpy.arange(row.inputs[0], row.inputs[0] + 12)).all() for row in drawn)
    assert all((row.targets == row.inputs + 1).all() for row in drawn)
    assert (samples.sample(0, 5).targets == IGNORE_INDEX).all()


def test_text_with_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short " * 4)
    config = make_config(*TINY, f"data.path={tmp_path / 'short.txt'}")
    data_identity(config)
    train = config.train.model_copy(update={"eval_interval": 1})
    with pytest.raises(ConfigError, match="the text has 24 tokens, too few to hold out one of two samples"):
        data_identity(config.model_copy(update={"train": train}))


# --- killed while it trains


@pytest.mark.slow
def test_killed_runs_go_on_bit_by_bit(tmp_path: Path) -> None:
    """kill -9 of all ranks after 12, 17, 23 and 37 of 40 steps, and in the middle of writing a checkpoint."""
    common = [*TINY, *ORIGINS["zb_v"], "train.steps=40", "train.checkpoint_interval=10"]
    newest = {}
    for kill_at in (12, 17, 23, 37):
        newest[f"{kill_at}/run"] = kill_at // 10 * 10

        def reached(lines: Path = tmp_path / f"{kill_at}/run/metrics.jsonl", kill_at: int = kill_at) -> bool:
            return lines.exists() and lines.read_bytes().count(b"\n") >= kill_at

        kill_when(reached, {"runs": [("run", common)]}, tmp_path / str(kill_at))
    half_written = tmp_path / "writing/run/checkpoints/.step-00000030"
    argument = {"runs": [("run", common)], "hang_at_step": 30}
    kill_when(lambda: any(half_written.glob("__1_*")), argument, tmp_path / "writing")
    assert half_written.exists()
    newest["writing/run"] = 20

    (tmp_path / "again").mkdir()
    resumed = [(f"from/{name}", [*common, f"train.resume={tmp_path / name}"]) for name in newest]
    whole, *rest = run_ranks(2, "ranks_train", {"runs": [("whole", common), *resumed]}, tmp_path / "again")
    assert [line["step"] for line in whole] == list(range(1, 41))
    for (name, step), lines in zip(newest.items(), rest, strict=True):
        before = curve(read_jsonl(tmp_path / name / "metrics.jsonl"))
        assert step < len(before) + (name == "writing/run") < 40
        assert before == curve(whole)[: len(before)]
        assert curve(lines) == curve(whole, first_step=step + 1)


def kill_when(reached: Callable[[], bool], argument: Any, folder: Path) -> None:
    """Start ranks and kill them all, the moment that something is reached."""
    folder.mkdir()
    ranks = start_ranks(2, "ranks_train", argument, folder)
    try:
        deadline = time.monotonic() + 300
        while not reached():
            assert time.monotonic() < deadline
            assert not ranks.has_ended(), (folder / "rank0.log").read_text()
            time.sleep(0.001)
    finally:
        ranks.kill()
        ranks.wait()


# --- what is refused


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model at step 5, as far as can be told without loading it."""
    return write_checkpoint(tmp_path / "runs/attempt-1/checkpoints", step=5)


def write_checkpoint(folder: Path, step: int) -> Path:
    directory = directory_of(folder, step)
    directory.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (directory / name).write_bytes(f"{name} {step}".encode() * 100)
    meta = Meta(
        format=1,
        step=step,
        optimizer_step=step,
        scheduler_step=step,
        loss_scale={},
        files={f.name: FileRecord(num_bytes=f.stat().st_size, crc32=checksum(f)) for f in directory.iterdir()},
        config=SavedConfig(**make_config(*TINY).model_dump(mode="json")),
    )
    write_json(directory / "meta.json", meta.model_dump())
    return directory


def resume(path: object, *overrides: str) -> list[str]:
    return [*TINY, f"train.resume={path}", *overrides]


def load(*overrides: str) -> RunConfig:
    """As `make_config`, which remembers what it has seen."""
    return load_config(compose_raw(*overrides), MACHINE)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def change(directory: Path) -> None:
    content = bytearray((directory / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "__0_0.distcp").write_bytes(content)


def set_in_meta(**changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        write_json(directory / "meta.json", (read_json(directory / "meta.json") or {}) | changes)

    return spoil


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        f"{name} cut at {share}": (cut(name, share), f"{name} has {{}} bytes instead of")
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
        for share in (0, 0.3, 0.99)
    },
    **{f"meta.json cut at {share}": (cut("meta.json", share), "meta.json is damaged") for share in (0, 0.3, 0.99)},
    "a bit changed": (change, "the content of .*__0_0.distcp has changed"),
    "a file missing": (lambda directory: (directory / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "meta.json missing": (lambda directory: (directory / "meta.json").unlink(), "holds no complete checkpoint"),
    "of the future": (set_in_meta(format=2), "not of format 1"),
    "no configuration": (set_in_meta(config={}), "meta.json is damaged"),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_refused(checkpoint: Path, damage: Callable[[Path], None], sentence: str) -> None:
    load(*resume(checkpoint))
    damage(checkpoint)
    with pytest.raises(ConfigError, match=sentence.replace("{}", r"[\d,]+")):
        load(*resume(checkpoint))


REFUSALS = [
    (["model.num_hidden_layers=4"], "another model: its model.num_hidden_layers is 2, here it is 4"),
    (["model=llama_tiny"], "another model: its model.family is 'gpt2', here it is 'llama'"),
    (["train.optimizer=sgd"], "holds the state of adamw, not of train.optimizer=sgd; use train.optimizer=adamw"),
    (["train.steps=7"], "at step 5, which leaves nothing to time up to train.steps=7 .* use train.steps=8 or more"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSALS)
def test_other_trainings_are_refused(checkpoint: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(*resume(checkpoint, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=8"],
        ["train.precision=bf16", "parallel.tp=2"],
        ["model.name=other", "train.learning_rate=0"],
        ["model.compile=true", "model.onednn=false"],
    ],
)
def test_other_settings_may_change(checkpoint: Path, overrides: list[str]) -> None:
    load(*resume(checkpoint, *overrides))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("nowhere", "does not exist"), (".", "holds no complete checkpoint"), ("rank0.log", "holds no complete")],
)
def test_no_checkpoint_is_refused(tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "rank0.log").touch()
    with pytest.raises(ConfigError, match=sentence):
        load(*resume(tmp_path / path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight/head.weight": (2, 2)}, "1 tensors differ, .* weight/head.weight with shape .2, 2. instead of none"),
        ({"weight/a": None}, "1 tensors differ, the first is weight/a with shape none instead of .3,."),
        ({"weight/a": (4,), "weight/b": None}, "2 tensors differ, .* weight/a with shape .4,. instead of .3,."),
    ],
)
def test_other_tensors_are_refused(changes: dict[str, Any], sentence: str) -> None:
    expected = {"weight/a": (3,), "weight/b": (3, 5)}
    shapes = {name: shape for name, shape in (expected | changes).items() if shape is not None}
    saved = {name: TensorStorageMetadata(TensorProperties(), torch.Size(shape), []) for name, shape in shapes.items()}
    with pytest.raises(ConfigError, match=sentence):
        check_tensors(Path("step-00000001"), Metadata(saved), expected)


def test_launcher_refuses_before_start(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut("__0_0.distcp", 0.5)(checkpoint)
    assert main(resume(checkpoint, f"results_dir={tmp_path / 'results'}")) == 2
    assert "error: the checkpoint is damaged" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# --- which one is meant


def test_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    point = tmp_path / "point"
    for attempt, step in ((1, 5), (1, 30), (2, 20)):
        write_checkpoint(point / f"attempt-{attempt}/checkpoints", step)
    (point / "attempt-1/checkpoints/.step-00000040").mkdir()
    (point / "attempt-1/checkpoints/step-00000050").mkdir()
    assert find_checkpoint(str(point)) == point / "attempt-1/checkpoints/step-00000030"
    assert find_checkpoint(str(point / "attempt-2")) == point / "attempt-2/checkpoints/step-00000020"
    assert find_checkpoint(str(point / "attempt-1/checkpoints")).name == "step-00000030"


def test_identity_follows_the_content(checkpoint: Path, tmp_path: Path) -> None:
    resumed = identity(load(*resume(checkpoint)), "data")
    assert resumed != identity(make_config(*TINY), "data")
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert identity(load(*resume(tmp_path / "moved")), "data") == resumed
    set_in_meta(step=4)(tmp_path / "moved")
    assert identity(load(*resume(tmp_path / "moved")), "data") != resumed


# --- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounting.returncode:
        pytest.skip(f"a small disk can't be mounted: {mounting.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["train.steps=6", "train.checkpoint_interval=2", "tracking.wandb.mode=disabled"]
    assert main([*TINY, *options, "parallel.tp=2", f"results_dir={small_disk}"]) == 1
    assert "step-00000004 can't be written: No space left on device; step-00000002 is" in capfd.readouterr().err
    (status,) = small_disk.glob("runs/points/*/attempt-1/status.json")
    assert json.loads(status.read_text())["status"] == "crashed"
    kept = find_checkpoint(str(status.parent))
    assert [path.name for path in kept.parent.iterdir()] == ["step-00000002"]
    load(*resume(kept))
