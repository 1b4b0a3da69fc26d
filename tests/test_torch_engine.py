"""torch's own engines behind the protocol: they train as DeepSpeed's does, and all take over from each other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import MACHINE, agree, compose_raw, make_config
from test_checkpoint import TINY

from harness.checkpoints import directory_of
from harness.errors import ConfigError
from harness.record.store import read_json
from harness.spec.families import FAMILIES
from harness.spec.resolve import load_config

COMMON = [*TINY, "train.steps=6", "train.warmup_steps=1", "train.eval_interval=3", "model.dropout=0.1"]
VARIED = ["train.activation_checkpointing=full", "train.gradient_clipping=0.5", "model.tie_word_embeddings=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by run, from one launch."""
    common, torch = [*COMMON, *VARIED], "parallel.engine=torch"
    runs = {
        "deepspeed": [*common, "train.checkpoint_interval=3"],
        "torch": [*common, torch, "train.checkpoint_interval=3"],
    }
    for engine, other in (("torch", []), ("deepspeed", [torch])):  # goes on where the other one stood
        checkpoint = directory_of(folder / engine / "checkpoints", 3)
        runs[f"after {engine}"] = [*common, *other, f"train.resume={checkpoint}"]
    lines = run_ranks(1, "ranks_train", {"runs": list(runs.items())}, folder)
    return dict(zip(runs, lines, strict=True))


@pytest.mark.parametrize("key", ["train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"])
@pytest.mark.parametrize("run", ["torch", "after torch", "after deepspeed"])
def test_engines_train_alike_and_go_on_from_each_others_checkpoints(
    curves: dict[str, list[dict[str, Any]]], run: str, key: str
) -> None:
    steps = {line["step"]: line for line in curves["deepspeed"]}
    found = {line["step"]: line[key] for line in curves[run] if line.get(key) is not None}
    assert len(found) >= (1 if key == "eval/loss" else 3)
    assert found == pytest.approx({step: steps[step][key] for step in found}, rel=1e-4)


def test_its_steps_are_measured_like_any(curves: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    assert curves["torch"]
    result = read_json(folder / "torch" / "result.json")
    assert result is not None
    assert result["missing"] == []
    assert (result["optimizer"], result["lost"]) == ("AdamW", [])
    overrides = [*COMMON, *VARIED, "parallel.engine=torch"]
    agree(lambda n: check_accounting(measure_again(folder / f"again {n}", 1, overrides) if n else result, 0.5e-3))
    assert result["bubble"]["measured"]["fraction"] == result["row"]["bubble_fraction_measured"]
    assert not (folder / "torch" / "ds_config.json").exists()


def measure_again(folder: Path, world_size: int, overrides: list[str]) -> Any:
    """result.json of a training of its own."""
    folder.mkdir()
    run_ranks(world_size, "ranks_train", {"runs": [("run", overrides)]}, folder)
    return read_json(folder / "run" / "result.json")


def check_accounting(result: Any, allowed_seconds: float) -> None:
    assert result["accounting"]
    for stage in result["accounting"]:
        assert stage["num_missing"] == 0
        assert abs(stage["residual_seconds"]) < max(0.01 * stage["step_seconds"], allowed_seconds)


# --- two ranks

TWO = [*COMMON, "model.dropout=0", "model.num_hidden_layers=4", "train.gradient_clipping=0.5"]
LAYOUTS = {
    "deepspeed": ["parallel.pp=2"],
    "torch": ["parallel.engine=torch", "parallel.pp=2", "parallel.schedule=zb_v"],
    "dtensor": ["parallel.engine=dtensor", "parallel.tp=2"],
    "ddp": ["parallel.engine=ddp", "parallel.dp=2"],
}
SUCCESSORS = {"deepspeed": "torch", "torch": "dtensor", "dtensor": "ddp", "ddp": "deepspeed"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def parallel(two_ranks: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by run, from one launch; each engine goes on where another stood."""
    runs = {engine: [*TWO, *layout, "train.checkpoint_interval=3"] for engine, layout in LAYOUTS.items()}
    for engine, successor in SUCCESSORS.items():
        checkpoint = directory_of(two_ranks / engine / "checkpoints", 3)
        runs[f"after {engine}"] = [*TWO, *LAYOUTS[successor], f"train.resume={checkpoint}"]
    lines = run_ranks(2, "ranks_train", {"runs": list(runs.items())}, two_ranks)
    return dict(zip(runs, lines, strict=True))


@pytest.mark.parametrize("run", [*list(LAYOUTS)[1:], *(f"after {engine}" for engine in SUCCESSORS)])
def test_parallel_engines_train_alike(parallel: dict[str, list[dict[str, Any]]], run: str) -> None:
    steps = {line["step"]: line for line in parallel["deepspeed"]}
    assert [line["step"] for line in parallel[run]] == ([4, 5, 6] if run.startswith("after") else [1, 2, 3, 4, 5, 6])
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
        found = {line["step"]: line[key] for line in parallel[run] if line.get(key) is not None}
        assert found == pytest.approx({step: steps[step][key] for step in found}, rel=1e-4)
        assert 6 in found


@pytest.mark.parametrize("engine", [*LAYOUTS])
def test_where_their_time_goes_is_known(
    parallel: dict[str, list[dict[str, Any]]], two_ranks: Path, engine: str
) -> None:
    assert parallel[engine]
    result = read_json(two_ranks / engine / "result.json")
    assert result is not None
    assert (result["missing"], result["lost"]) == ([], [])
    overrides = [*TWO, *LAYOUTS[engine]]
    agree(lambda n: check_accounting(measure_again(two_ranks / f"{engine} {n}", 2, overrides) if n else result, 1e-3))
    assert result["bubble"]["measured"]["fraction"] == result["row"]["bubble_fraction_measured"]


# --- refusals


@pytest.mark.parametrize(
    ("engine", "overrides", "words"),
    [
        ("torch", "parallel.tp=2", "runs one rank or a pipeline without ZeRO, not tp=2 x pp=1 x dp=1"),
        ("torch", "parallel.dp=2", "runs one rank or a pipeline without ZeRO, not tp=1 x pp=1 x dp=2"),
        ("torch", "parallel.pp=2 parallel.zero_stage=1", "pp=2 x dp=1 with zero_stage=1; use"),
        ("torch", "parallel.pp=2 parallel.schedule=zb_h1", "none of torch.distributed.pipelining's"),
        ("torch", "parallel.pp=2 parallel.schedule=zb_auto", "use gpipe, 1f1b, interleaved, zb_v, dualpipev, or"),
        ("torch", "parallel.pp=2 train.global_batch_size=1", "1 are fewer than parallel.pp=2; use more, or gpipe"),
        ("torch", "train.precision=bf16", "trains in fp32, not in train.precision=bf16"),
        ("torch", "deepspeed.csv_monitor.enabled=true", "reads no deepspeed.* settings"),
        ("dtensor", "parallel.pp=2", "parallel.engine=dtensor runs tensor parallelism without ZeRO, not tp=1 x pp=2"),
        ("dtensor", "parallel.tp=2 parallel.sequence_parallel=true", "parallel.engine=dtensor slices no sequence"),
        ("dtensor", "parallel.tp=4 model=llama_tiny model.num_key_value_heads=2", "use a tp that divides them"),
        ("dtensor", "parallel.tp=2 model.dropout=0.1", "draws no masks, but model.dropout=0.1; use 0"),
        ("dtensor", "parallel.tp=2 model.onednn=true", "computes products as torch does; use model.onednn=null"),
        ("dtensor", "parallel.tp=2 model=emulated", "has no layers for model.family=emulated"),
        ("dtensor", "parallel.tp=2 model=bert_tiny", "has no layers for model.family=bert"),
        ("dtensor", "parallel.tp=2 model=encoder_tiny", "has no layers for model.family=encoder"),
        ("dtensor", "parallel.tp=2 model=llama_tiny model.family=qwen3", "has no layers for model.family=qwen3"),
        ("dtensor", "parallel.tp=2 model.type_vocab_size=2", "has no layers for model.family=gpt2"),
        (
            "dtensor",
            "parallel.tp=2 model=llama_tiny model.sliding_window=64",
            "has no window, but model.sliding_window=64",
        ),
        ("dtensor", "parallel.tp=2 data.documents=packed", "has no masks for data.documents=packed"),
        ("dtensor", "parallel.schedule=zb_h1", "splits backward passes, which parallel.engine=dtensor can't"),
        ("ddp", "parallel.tp=2", "parallel.engine=ddp runs data parallelism without ZeRO, not tp=2"),
        ("ddp", "parallel.dp=2 parallel.schedule=gpipe", "not parallel.schedule=gpipe; use 1f1b"),
    ],
)
def test_what_they_can_not_run_is_refused(engine: str, overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_config(f"parallel.engine={engine}", *overrides.split())


def test_dtensor_runs_no_trait_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that is added later, too: what an engine knows is listed, not what it doesn't."""
    traits: list[dict[str, Any]] = [
        {"positions": "sinusoidal"}, {"norm_after": True}, {"head_norms": True}, {"embedding_norm": True},
        {"head_transform": True}, {"causal": False},
    ]  # fmt: skip
    for trait in traits:
        monkeypatch.setitem(FAMILIES, "other", replace(FAMILIES["gpt2"], **trait))
        with pytest.raises(ConfigError, match=r"has no layers for model\.family=other"):
            load_config(compose_raw("parallel.engine=dtensor", "parallel.tp=2", "model.family=other"), MACHINE)
