"""Plain torch behind the protocol of engines: it trains as DeepSpeed's does, and they take over from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import make_config
from test_checkpoint import TINY

from harness.checkpoints import directory_of
from harness.errors import ConfigError
from harness.record.store import read_json

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
    (stage,) = result["accounting"]
    assert stage["num_missing"] == 0
    assert abs(stage["residual_seconds"]) < max(0.01 * stage["step_seconds"], 0.5e-3)
    assert result["bubble"]["measured"]["fraction"] == result["row"]["bubble_fraction_measured"]
    assert not (folder / "torch" / "ds_config.json").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pp=2"], "runs one rank without ZeRO, not tp=1 x pp=2 x dp=1"),
        (["train.precision=bf16"], "trains in fp32, not in train.precision=bf16"),
        (["deepspeed.csv_monitor.enabled=true"], "reads no deepspeed.* settings"),
    ],
)
def test_what_it_can_not_run_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.").replace("*", r"\*")):
        make_config("parallel.engine=torch", *overrides)
