"""Perplexity of held-out text is that of a plain computation in float64, with int8 too, in every layout."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import REPOSITORY, run_ranks
from helpers import make_config
from helpers_model import random_state, tiny_model
from references import build_reference, use_exact_norms
from states import to_transformers
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.launch.points import data_identity
from harness.model.packing import hidden_steps
from harness.model.products import HAS_ONEDNN
from harness.record.columns import COLUMNS
from harness.record.inference import HeldOut, MeasuredInference
from harness.record.store import read_measured
from harness.record.summary import perplexity_lines
from harness.spec.generation import num_perplexity_samples

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN, and so no int8")

LENGTH, SAMPLES = 48, 3
MODELS = {
    kind: tiny_model("llama", hidden_size=64, head_dim=8, num_key_value_heads=4, intermediate_size=96, vocab_size=259,
                     max_position_embeddings=LENGTH, tie_word_embeddings=kind == "tied")
    for kind in ("tied", "untied")
}  # fmt: skip
"""As many positions as a sample shall have: train.sequence_length is larger."""
LAYOUTS = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2)}
HOW = {
    "fp32": ["generate.perplexity_samples=3"],
    "int8": ["generate.perplexity_samples=3", "generate.quantization=int8"],
    "bf16": ["generate.perplexity_samples=3", "train.precision=bf16"],
    "by default": ["generate.quantization=int8"],
    "not at all": [],
}
TEXT = "".join(f"{n} times {n} is {n * n}; " for n in range(400)).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of each model as `transformers` stores them, and a text."""
    folder = tmp_path_factory.mktemp("perplexity")
    for kind in MODELS:
        reference(kind).float().save_pretrained(folder / kind)
    (folder / "text.txt").write_bytes(TEXT)
    return folder


def overrides_of(place: Path, kind: str) -> list[str]:
    return [f"model.weights={place / kind}", f"data.path={place / 'text.txt'}", "generate.prompt_length=8"]


@pytest.fixture(scope="module")
def answers(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of layout, model and way."""
    found = {}
    for num_ranks in (1, 2):
        cases = {
            f"{name} {kind} {way}": [*overrides_of(place, kind), *how, f"parallel.tp={tp}", f"parallel.pp={pp}"]
            for name, (tp, pp) in LAYOUTS.items()
            for kind in MODELS
            for way, how in HOW.items()
            if tp * pp == num_ranks
        }
        found |= run_ranks(num_ranks, "ranks_perplexity", cases, tmp_path_factory.mktemp(f"ranks{num_ranks}"))
    return found


def reference(kind: str) -> Any:
    model = MODELS[kind]
    made = build_reference(model, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    made.load_state_dict(to_transformers(random_state(model), model), strict=False)
    if model.tie_word_embeddings:
        made.tie_weights()
    return made.eval()


def windows() -> Tensor:
    """The last 5 % of the text are held out; samples begin evenly spread over it."""
    held_out = TEXT[len(TEXT) - len(TEXT) // 20 :]
    starts = [(len(held_out) - LENGTH - 1) * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return torch.tensor([[*held_out[start : start + LENGTH + 1]] for start in starts])


@torch.no_grad()
def losses_of(model: nn.Module) -> Tensor:
    """Of each token."""
    tokens = windows()
    scores = model(tokens[:, :-1]).logits
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def steps_of(rows: Tensor, steps: int, num_parts: int) -> Tensor:
    """Each part of each row rounded to multiples of its largest / steps."""
    parts = rows.unflatten(-1, (num_parts, -1))
    scale = parts.abs().amax(-1, keepdim=True) / steps
    return ((parts / scale).round() * scale).flatten(-2)


def rounded(model: Any, tp: int) -> Any:
    """Every matrix product between rounded numbers; those that tensor parallelism splits over inputs by its parts."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            num_parts = tp if name.endswith(("o_proj", "down_proj")) else 1
            layer.weight = nn.Parameter(steps_of(layer.weight, 127, num_parts))
            layer.register_forward_pre_hook(
                lambda _, given, num_parts=num_parts: (steps_of(given[0], hidden_steps(), num_parts),)
            )
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_fp32_is_that_of_float64(
    layout: str, kind: str, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_norms(monkeypatch)
    expected = float(losses_of(reference(kind).double()).mean())
    for way in ("fp32", "int8", "bf16"):
        answer = answers[f"{layout} {kind} {way}"]
        assert answer["loss_fp32"] == pytest.approx(expected, rel=1e-6)
        assert answer["num_tokens"] == SAMPLES * LENGTH
    assert answers[f"{layout} {kind} fp32"]["loss"] == answers[f"{layout} {kind} fp32"]["loss_fp32"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_int8_is_that_of_rounded_numbers_in_float64(
    layout: str, kind: str, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_norms(monkeypatch)
    exact = losses_of(reference(kind).double())
    model = reference(kind).double()
    if model.config.tie_word_embeddings:  # only the head is rounded
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    expected = losses_of(rounded(model, LAYOUTS[layout][0]))
    # A number within fp32 of the middle between two steps may become the other one, and its row with it.
    of_one_row = float((expected - exact).std()) / len(exact)
    found = answers[f"{layout} {kind} int8"]["loss"]
    assert abs(found - float(expected.mean())) < 3 * of_one_row
    assert 1e-6 < abs(found / float(exact.mean()) - 1) < 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_rounding_changes_a_little_and_is_the_same_on_more_stages(kind: str, answers: dict[str, Any]) -> None:
    for way in ("fp32", "int8", "bf16"):
        found, expected = (answers[f"{layout} {kind} {way}"] for layout in ("1x2", "1x1"))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    answer = answers[f"2x1 {kind} bf16"]
    assert 1e-6 < abs(answer["loss"] / answer["loss_fp32"] - 1) < 0.02


def test_what_is_the_same_is_measured_once(answers: dict[str, Any]) -> None:
    """And no model is in memory beside another, see `ranks_perplexity`."""
    stages = {way: answers[f"2x1 tied {way}"]["stages"] for way in HOW}
    assert stages == {"fp32": 1, "int8": 2, "bf16": 2, "by default": 2, "not at all": 0}
    assert answers["2x1 tied by default"]["num_tokens"] == 8 * LENGTH


def test_when_it_is_measured(place: Path) -> None:
    weights = overrides_of(place, "tied")

    def count(*overrides: str) -> int:
        return num_perplexity_samples(make_config(*overrides))

    assert count("task=generate", *weights) == 0
    assert count("task=generate", *weights, "generate.quantization=int8") == 8
    assert count("task=generate", *weights, "train.precision=bf16") == 8
    assert count("task=generate", *weights, "train.precision=bf16", "generate.perplexity_samples=0") == 0
    assert count("task=generate", "generate.quantization=int8") == 0
    assert count("task=generate", "generate.perplexity_samples=5") == 5
    assert count("task=forward", *weights, "generate.quantization=int8", "train.sequence_length=16") == 0


def test_the_text_is_part_of_the_point(place: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.txt").write_bytes(TEXT)
    (tmp_path / "other.txt").write_bytes(TEXT[1:])
    names: dict[str, list[str]] = {}
    for samples in (0, 3):
        for text in (place / "text.txt", tmp_path / "moved.txt", tmp_path / "other.txt"):
            given = ["task=generate", f"generate.perplexity_samples={samples}", f"data.path={text}"]
            names.setdefault(text.stem, []).append(data_identity(make_config(*given)))
    assert names["text"] == names["moved"]
    assert names["text"][0] == names["other"][0]
    assert len({*names["text"], *names["other"]}) == 3


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("short " * 4, ["train.sequence_length=12"], "the text has 24 tokens, too few to hold out one of two samples "
         "of train.sequence_length=12; give a longer text, or generate.perplexity_samples=0"),
        ("short", ["train.sequence_length=12"], "or measure no perplexity, with generate.perplexity_samples=0"),
        ("long " * 99, ["model=emulated"], "computes nothing that has a perplexity"),
        ("long " * 99, ["data.documents=padded"], "use data.documents=cut, or generate.perplexity_samples=0"),
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_said_before_the_start(
    text: str, overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text)
    given = ["task=generate", f"data.path={tmp_path / 'text.txt'}", *overrides]
    data_identity(make_config(*given[:2]))
    with pytest.raises(ConfigError) as caught:
        data_identity(make_config(*given, "generate.perplexity_samples=2"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["generate.quantization=int8"], "7.3891 with int8, 2.7183 in fp32"),
        (["train.precision=bf16"], "7.3891 in bf16, 2.7183 in fp32"),
        (["train.precision=bf16", "generate.quantization=int8"], "7.3891 with int8 in bf16, 2.7183 in fp32"),
        ([], "2.7183 in fp32"),
    ],
)  # fmt: skip
def test_what_is_said(overrides: list[str], said: str) -> None:
    config = make_config("task=generate", *overrides)
    run = MeasuredInference(config, [], None, held_out=HeldOut(2.0, 1.0, 1024, "a text"))
    columns = {column.name: column.inferred(run) for column in COLUMNS if column.inferred and "eval" in column.name}
    assert columns == {"eval_loss": 2.0, "eval_perplexity": math.exp(2), "eval_perplexity_fp32": math.e}
    result = {"row": columns, "held_out": vars(run.held_out)}
    assert perplexity_lines(config, result) == [f"perplexity  {said} (held-out: 1,024 tokens of a text)"]
    assert perplexity_lines(config, {"row": {}, "held_out": None}) == []


def test_a_generation_says_what_int8_does(place: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "launchers/generate.py", *overrides_of(place, "tied"), "generate.quantization=int8",
        "generate.prompt=9 times", "generate.max_new_tokens=4", "parallel.pp=2", f"results_dir={tmp_path}",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("perplexity"))
    assert line.endswith(f"(held-out: {8 * LENGTH} tokens of data.path='{place / 'text.txt'}')")
    (file,) = tmp_path.rglob("result.json")
    row = (read_measured(file) or {})["row"]
    assert f" {row['eval_perplexity']:.2f}"[:-1] in line
    assert row["eval_perplexity"] == math.exp(row["eval_loss"])
    assert 1e-6 < abs(row["eval_perplexity"] / row["eval_perplexity_fp32"] - 1) < 0.2
    assert f"{row['eval_perplexity_fp32']:.2f}"[:-1] in line
