"""Models that begin from `save_pretrained` folders compute and learn as in `transformers`, in every layout.

All in one launch of four ranks. Every tensor of the folders is random, norms and biases too: fresh biases are zeros and
hide what is wrong with them.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from helpers import make_config
from helpers_model import relative_error
from ranks_weights import tokens_of
from references import MODELS, build_reference, use_exact_norms
from torch import Tensor, nn

from harness.corpus import prepare_corpus
from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.run.conversion import import_weights
from harness.run.data import CorpusSamples
from harness.run.weights import fill_parameters
from harness.spec.config import Model, RunConfig

NAMES = ("gpt2", "llama grouped", "llama scaled", "mistral", "qwen2", "qwen3", "bert")
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 96,
    "vocab_size": 211, "max_position_embeddings": 32,
}  # fmt: skip
LAYOUTS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
BATCH, SEQUENCE, STEPS = 2, 24, 20
TOLERANCE = 2e-5
"""Of the deviation of logits, in fp32; those of an approximate GELU are off by 4e-4."""


def shape_of(name: str) -> Model:
    wide = {"head_dim": 16} if name == "qwen3" else {}
    window = {"sliding_window": 9} if name == "mistral" else {}
    return MODELS[name].model_copy(update=SHAPE | wide | window)


def save_random(model: Model, folder: Path) -> None:
    """std 0.1, and weights of norms around 1.

    There the embedding of a token for padding never learns as an input; among random tokens none is for padding.
    """
    reference = build_reference(model, pad_token_id=None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            is_norm = key.endswith("weight") and parameter.dim() == 1
            parameter.copy_(is_norm + 0.1 * torch.randn(parameter.shape, generator=generator))
    reference.save_pretrained(folder, max_shard_size="60KB" if model.family in ("llama", "bert") else "5GB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pretrained")
    for name in NAMES:
        save_random(shape_of(name), place / name)
    import_weights(place / "bert", place / "imported bert")
    return {name: place / name for name in (*NAMES, "imported bert")}


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    kind = "AutoModelForMaskedLM" if "bert" in folder.name else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="sdpa")
    return model.to(dtype)


def quoted(folder: Path) -> str:
    return f"model.weights='{folder}'"


def training_of(folder: Path, optimizer: str) -> list[str]:
    rate = {"sgd": "0.02", "adamw": "3e-5"}[optimizer]
    return [
        quoted(folder), "data=synthetic", f"train.sequence_length={SEQUENCE}", "train.micro_batch_size=2",
        "train.global_batch_size=8", f"train.steps={STEPS}", f"train.optimizer={optimizer}",
        f"train.learning_rate={rate}", "train.learning_rate_warmup_steps=0", "train.learning_rate_decay=constant",
    ]  # fmt: skip


TRAINED = [(name, optimizer) for name in ("qwen3", "bert") for optimizer in ("sgd", "adamw")]


def case(name: str, layout: tuple[int, int, int]) -> str:
    return f"{name} {'x'.join(map(str, layout))}"


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Logits of every folder in every layout, and trainings of two in one; one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    logits = []
    for (name, place), (number, (tp, pp, dp)) in product(folders.items(), enumerate(LAYOUTS)):
        options = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.dp={dp}", f"train.micro_batch_size={BATCH}"]
        options += [f"train.sequence_length={SEQUENCE}", f"train.global_batch_size={BATCH * dp * pp}"]
        options += ["parallel.sequence_parallel=true"] * (number % 2 == 0 and tp > 1)
        logits.append((case(name, (tp, pp, dp)), [quoted(place), *options]))
    runs = [
        (f"{name} {optimizer}", [*training_of(folders[name], optimizer), "parallel.tp=2", "parallel.pp=2"])
        for name, optimizer in TRAINED
    ]
    return folder, run_ranks(4, "ranks_weights", {"logits": logits, "runs": runs}, folder)


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_computes_logits_of_transformers_in_float64(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_norms(monkeypatch)
    config = make_config(quoted(folders[name]), f"train.sequence_length={SEQUENCE}")
    layers, single = build_layers(config.model, TensorParallel.single()), TensorParallel.single()
    fill_parameters(layers.named_parameters(), config, single)
    tokens = tokens_of(config.model.vocab_size, BATCH, SEQUENCE)
    expected = loaded(folders[name], torch.float64)(tokens).logits
    assert relative_error(layers.double()(tokens), expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
@pytest.mark.parametrize("name", [*NAMES, "imported bert"])
def test_layouts_compute_logits_of_transformers(
    folders: dict[str, Path], answers: tuple[Path, dict[str, Any]], name: str, layout: tuple[int, int, int]
) -> None:
    found = torch.load(answers[0] / f"{case(name, layout)}.pt")
    tokens = tokens_of(SHAPE["vocab_size"], BATCH, SEQUENCE)
    expected = loaded(folders[name.removeprefix("imported ")], torch.float64)(tokens).logits
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.slow
def test_a_checkpoint_begins_as_the_folder_it_came_from(answers: tuple[Path, dict[str, Any]]) -> None:
    for layout in LAYOUTS:
        one, other = (torch.load(answers[0] / f"{case(name, layout)}.pt") for name in ("bert", "imported bert"))
        assert torch.equal(one, other)


def batches(config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets of each step, by the definition of samples."""
    train = config.train
    corpus = prepare_corpus(config.data, config.model.vocab_size, train.sequence_length, train.objective)
    samples = CorpusSamples(config, corpus)
    steps = []
    for step in range(train.steps):
        rows = [samples.sample(step, number) for number in range(train.global_batch_size)]
        steps.append(
            tuple(torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*rows, strict=True))
        )
    return steps  # type: ignore[return-value]


def train_in_plain_torch(model: nn.Module, config: RunConfig) -> list[float]:
    train, parameters = config.train, list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=train.learning_rate)
    else:
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = train.adam_betas[0], train.adam_betas[1]
        optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon)
    losses = []
    for tokens, targets in batches(config):
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), TRAINED)
def test_fine_tuning_is_that_of_transformers(
    folders: dict[str, Path], answers: tuple[Path, dict[str, Any]], name: str, optimizer: str
) -> None:
    """20 steps of tp=2 x pp=2 in fp32 beside plain torch on one process; AdamW amplifies rounding."""
    config = make_config(*training_of(folders[name], optimizer))
    expected = train_in_plain_torch(loaded(folders[name], torch.float32), config)
    found = [line["train/loss"] for line in answers[1][f"{name} {optimizer}"]]
    assert len(found) == STEPS
    assert found[0] - found[-1] > (1e-3 if optimizer == "sgd" else 1e-4) * found[0]
    assert found == pytest.approx(expected, rel={"sgd": 1e-6, "adamw": 1e-4}[optimizer])
