"""Samples of documents: which they hold, where their targets are, what is masked, and that nothing else matters."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from helpers_model import fill, random_state, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from references import MODELS

from harness.corpus import Corpus, document_lengths
from harness.documents import make_rows, pack
from harness.errors import ConfigError
from harness.launch.points import data_identity
from harness.model.assembly import build_layers
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.loss import IGNORE_INDEX
from harness.run.data import (
    CorpusSamples,
    HeldOutSamples,
    Masks,
    Sample,
    documents_of,
    load_of,
    step_micro_batches,
    tell_documents,
)
from harness.run.engines.engine import Before
from harness.run.engines.torch.engine import TorchEngine
from harness.run.evaluate import Evaluation
from harness.run.parity import MaskedSamples
from harness.spec.config import RunConfig
from harness.spec.counts import training_flops_per_token

SEQUENCE = 16
MASK, SPECIAL = 900, (7, 8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """60 documents of 1 to 16 tokens, each of a number of its own: token = 10 x document + place, below 900."""
    folder = tmp_path_factory.mktemp("corpus")
    lengths = np.random.default_rng(1).integers(1, SEQUENCE + 1, 60)
    tokens = np.concatenate([(10 * k + np.arange(n)) % MASK for k, n in enumerate(lengths)]).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    ends = np.cumsum(lengths)
    np.save(folder / "documents.npy", np.stack((ends - lengths, ends, np.arange(60)), axis=1))
    documents = folder / "documents.npy"
    return Corpus(folder / "tokens.npy", len(tokens), "uint16", "f", "d", documents, (), MASK, MASK, SPECIAL)


def configure(documents: str, objective: str = "causal", *overrides: str) -> RunConfig:
    return make_config(
        "model=bert_tiny", "model.vocab_size=901", f"train.objective={objective}", f"data.documents={documents}",
        f"train.sequence_length={SEQUENCE}", *overrides,
    )  # fmt: skip


def document(corpus: Corpus, number: int) -> list[int]:
    assert corpus.path is not None
    assert corpus.documents is not None
    begin, end, _ = np.load(corpus.documents)[number]
    return [int(token) for token in np.load(corpus.path)[begin:end]]


# --- packing


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_packing_holds_everything_once_and_wastes_little(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < size <= capacity for size in filled)
    assert all(row == sorted(row) for row in rows)
    least = math.ceil(sum(lengths) / capacity)
    assert len(rows) <= 11 / 9 * least * 2 + 1  # the fewest possible are at most twice the least, and one
    # Of two rows the later one was begun because its first did not fit into the earlier one.
    assert sum(2 * size <= capacity for size in filled) <= 1


def test_packing_takes_the_tightest_place() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]  # 3 fits both, and leaves nothing in the first
    assert pack([], 10) == []


def test_packing_many_documents_leaves_next_to_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 20_000).tolist()
    rows = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.99


def test_held_out_documents_are_the_last_and_never_trained_on(corpus: Corpus) -> None:
    assert corpus.documents is not None
    lengths = document_lengths(corpus)
    for besides, packs in product((0, 1), (False, True)):
        rows = make_rows(lengths, SEQUENCE, besides, packs)
        training, held_out = (sorted(n for row in part for n in row) for part in rows)
        assert training + held_out == [n for n in range(60) if lengths[n] > besides]
        shares = np.cumsum(lengths[lengths > besides][::-1]) / lengths[lengths > besides].sum()
        assert shares[len(held_out) - 1] <= 0.05 < shares[len(held_out)]
        if not packs:
            assert all(len(row) == 1 for part in rows for row in part)
    assert make_rows(np.array([5]), SEQUENCE, 1, False) == ([[0]], [])
    assert make_rows(np.array([5, 9]), SEQUENCE, 1, False) == ([[1]], [[0]])
    assert make_rows(np.array([16, 5, 16]), SEQUENCE, 1, False) == ([[0], [2]], [[1]])  # the shortest
    assert make_rows(np.array([5, 16, 5]), SEQUENCE, 1, False) == ([[0], [1]], [[2]])
    assert make_rows(np.array([10, 10, 10, 10, 10, 10, 1, 2]), SEQUENCE, 1, False)[1] == [[7]]
    assert make_rows(np.array([1, 5, 1]), SEQUENCE, 1, True) == ([[1]], [])


# --- rows


@pytest.mark.parametrize("documents", ["padded", "packed"])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_holds_whole_documents_and_predicts_inside_of_each(
    corpus: Corpus, documents: str, held_out: bool
) -> None:
    config, seen = configure(documents), Counter[int]()
    samples = (HeldOutSamples if held_out else CorpusSamples)(config, corpus)
    for number in range(config.train.eval_samples if held_out else 60):
        inputs, targets = samples.sample(3, number)
        first = 0
        for length in samples.lengths(3, number):
            own = slice(first, first + length)
            which = int(inputs[first]) // 10
            whole = document(corpus, which)
            assert [*inputs[own], targets[own.stop - 1]] == whole
            assert [whole[0], *targets[own]] == whole
            seen[which] += 1
            first += length
        assert (inputs[first:] == 0).all()
        assert (targets[first:] == IGNORE_INDEX).all()
    others = (CorpusSamples if held_out else HeldOutSamples)(config, corpus)
    assert not set(seen) & {int(others.sample(3, n).inputs[0]) // 10 for n in range(60) if others.lengths(3, n)}
    most = max(len(samples.lengths(3, n)) for n in range(20))
    assert (most == 1) if documents == "padded" else (most > 1 or held_out)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_cut_text_is_the_windows_it_was(corpus: Corpus, objective: str) -> None:
    config = configure("cut", objective)
    samples, tokens = CorpusSamples(config, corpus), np.load(str(corpus.path))
    for number in range(5):
        inputs, targets = samples.sample(2, number)
        if objective == "causal":
            (start,) = [k for k in range(len(tokens) - SEQUENCE) if (tokens[k : k + SEQUENCE] == inputs).all()]
            assert (tokens[start + 1 : start + SEQUENCE + 1] == targets).all()
        assert samples.lengths(2, number) == [SEQUENCE]
    assert len(samples.sample(0, 0).inputs) == SEQUENCE


@pytest.mark.parametrize("documents", ["cut", "padded", "packed"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_samples_depend_on_seed_step_and_number_alone(corpus: Corpus, documents: str, objective: str) -> None:
    """Layouts and micro-batches deal the same rows out differently, documents among them."""
    batches, tables = [], []
    for size, dp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        layout = f"train.micro_batch_size={size}", f"parallel.dp={dp}", "train.global_batch_size=8"
        config = configure(documents, objective, *layout)
        samples = CorpusSamples(config, corpus)
        rows: dict[int, Any] = {}
        weights = set()
        for rank in range(dp):
            find = documents_of(config, samples)
            for k, (tokens, (targets, weight)) in enumerate(step_micro_batches(config, samples, rank, step=5)):
                weights.add(float(weight) / (config.num_micro_batches * dp))
                table = None if find is None else find(5, k, rank)
                for row in range(size):
                    number = (k * dp + rank) * size + row
                    rows[number] = tokens[row].tolist(), targets[row].tolist()
                    tables.append((number, None if table is None else tuple(table[row].tolist())))
        assert len(weights) == 1
        batches.append(([rows[n] for n in range(8)], 1 / weights.pop()))
        assert batches[-1] == batches[0]
        assert batches[0][1] == pytest.approx(sum(t != IGNORE_INDEX for _, targets in batches[0][0] for t in targets))
    assert len(set(tables)) == 8
    other = CorpusSamples(configure(documents, objective, "train.seed=2"), corpus)
    assert [other.sample(5, n).inputs.tolist() for n in range(8)] != [inputs for inputs, _ in batches[0][0]]
    assert [samples.sample(6, n).inputs.tolist() for n in range(8)] != [inputs for inputs, _ in batches[0][0]]


@pytest.mark.parametrize("documents", ["padded", "packed"])
def test_the_layers_are_told_of_documents_where_a_mask_is_needed(corpus: Corpus, documents: str) -> None:
    for objective in ("causal", "masked"):
        config = configure(documents, objective, "train.micro_batch_size=2")
        samples, context = CorpusSamples(config, corpus), PassContext()
        tell_documents(context, config, samples)
        assert (context.documents is None) == (documents == "padded" and objective == "causal")
        assert context.shares is not None
        lengths = [samples.lengths(1, number) for number in (2, 3)]
        assert context.shares(1, 1, 0) == sum(map(sum, lengths)) / (2 * SEQUENCE)
        if context.documents is not None:
            table = context.documents(1, 1, 0)
            for row, own in zip(table.tolist(), lengths, strict=True):
                expected = [k for k, n in enumerate(own) for _ in range(n)]
                assert row == expected + [len(own)] * (SEQUENCE - len(expected))
    context = PassContext()
    cut = configure("cut")
    tell_documents(context, cut, CorpusSamples(cut, corpus))
    assert context.documents is context.shares is None


def test_the_load_of_a_step(corpus: Corpus) -> None:
    config = configure("packed", "causal", "train.global_batch_size=4")
    samples = CorpusSamples(config, corpus)
    lengths = [n for number in range(4) for n in samples.lengths(1, number)]
    window = config.model_copy(update={"model": config.model.model_copy(update={"sliding_window": 4})})
    for own in (config, window):
        load = load_of(own, samples, 1)
        assert load[:2] == (sum(lengths), sum(n * n for n in lengths))
        for found, causal in ((load.flops, False), (load.causal_flops, True)):
            assert found == sum(n * training_flops_per_token(own.model, n, causal) for n in lengths)
    assert load_of(configure("cut"), CorpusSamples(configure("cut"), corpus), 0)[:2] == (8 * 16, 8 * 16 * 16)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 64, 100])
def test_held_out_rows_are_evaluated_once_and_evenly_spread(tmp_path: Path, count: int) -> None:
    """64 samples are asked for: each row once where there are fewer, else that many of them."""
    lengths = np.array([1000] * (count + 2) + [50] * count)  # the short ones are held out
    ends = np.cumsum(lengths)
    np.save(tmp_path / "tokens.npy", np.repeat(np.arange(len(lengths)), lengths).astype(np.uint32))
    np.save(tmp_path / "documents.npy", np.stack((ends - lengths, ends, np.arange(len(lengths))), axis=1))
    many = Corpus(tmp_path / "tokens.npy", int(ends[-1]), "uint32", "", "", tmp_path / "documents.npy", num_ids=9999)
    config = configure("padded", "causal", "model.max_position_embeddings=1024", "train.sequence_length=1000")
    samples = HeldOutSamples(config, many)
    seen = [int(samples.sample(0, n).inputs[0]) for n in range(64) if samples.lengths(0, n)]
    assert len(seen) == len(set(seen)) == min(64, count)
    assert all(number >= count + 2 for number in seen)
    assert {count + 2, 2 * count + 1} <= {*seen}
    assert samples.num_valid_targets(0) == 49 * len(seen)


# --- random tokens


@pytest.mark.parametrize("documents", ["padded", "packed"])
def test_random_documents_are_of_every_length(documents: str) -> None:
    config = configure(documents, "causal", "data=synthetic")
    samples = CorpusSamples(config, Corpus(None, 0, "int64", "", "", num_ids=901))
    lengths = [samples.lengths(0, number) for number in range(2000)]
    assert all(0 < sum(row) <= SEQUENCE for row in lengths)
    if documents == "padded":
        counts = np.bincount([row[0] for row in lengths], minlength=SEQUENCE + 1)[1:]
        assert ((counts - 125) ** 2 / 125).sum() < 37.7  # chi-square of 15 degrees of freedom: p > 0.001
    else:
        assert np.mean([sum(row) for row in lengths]) > SEQUENCE * 0.6
    inputs, targets = samples.sample(0, 1)
    first = 0
    for length in lengths[1]:  # each has its own last target
        assert (inputs[first + 1 : first + length] == targets[first : first + length - 1]).all()
        first += length
    held_out = HeldOutSamples(config, Corpus(None, 0, "int64", "", "", num_ids=901))
    assert held_out.sample(0, 1).inputs.tolist() == held_out.sample(9, 1).inputs.tolist() != inputs.tolist()
    assert held_out.lengths(0, 10**6) == []
    assert held_out.num_valid_targets(0) == sum(
        int((held_out.sample(0, n).targets >= 0).sum()) for n in range(config.train.eval_samples)
    )


# --- masks


def masked(corpus: Corpus, count: int, documents: str = "cut") -> list[tuple[Sample, Sample]]:
    """Rows as they are, and masked."""
    config, plain = configure(documents, "masked"), []
    masks = Masks(config, corpus)
    samples = CorpusSamples(config, corpus)
    for number in range(count):
        after = samples.sample(0, number)
        tokens = np.where(after.targets != IGNORE_INDEX, after.targets, after.inputs)
        valid = np.arange(SEQUENCE) < sum(samples.lengths(0, number))
        before = Sample(np.where(valid, tokens, 0), np.where(valid, tokens, IGNORE_INDEX))
        again = masks(before, 0, number)
        assert all((a == b).all() for a, b in zip(after, again, strict=True))
        plain.append((before, after))
    return plain


def test_shares_of_what_is_masked(corpus: Corpus) -> None:
    """15 % of the positions, of which 80 % are masks, 10 % random and 10 % as they were: within 4 deviations."""
    pairs = masked(corpus, 2000)
    kinds = Counter[str]()
    for before, after in pairs:
        for token, shown, target in zip(before.targets, after.inputs, after.targets, strict=True):
            kinds["eligible"] += int(token) not in SPECIAL
            if target == IGNORE_INDEX:
                assert shown == token
                continue
            assert target == token
            assert token not in SPECIAL
            kinds["chosen"] += 1
            kinds["mask" if shown == MASK else "same" if shown == token else "random"] += 1
            assert 0 <= shown <= MASK
    none = (1 - 0.15) ** SEQUENCE  # rows without any have one more
    expected = 0.15 * kinds["eligible"] + none * len(pairs)
    assert abs(kinds["chosen"] - expected) < 4 * math.sqrt(0.15 * 0.85 * kinds["eligible"]) + 0.01 * expected
    for kind, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        deviation = math.sqrt(share * (1 - share) * kinds["chosen"])
        assert abs(kinds[kind] - share * kinds["chosen"]) < 4 * deviation + kinds["chosen"] / MASK, kind


def test_a_row_is_masked_anew_in_every_step_and_with_every_seed(corpus: Corpus) -> None:
    row = masked(corpus, 1)[0][0]
    masks = [Masks(configure("cut", "masked", f"train.seed={seed}"), corpus) for seed in (1, 2)]
    found = [masks[seed](row, step, number).targets.tolist() for seed, step, number in product((0, 1), (0, 1), (0, 1))]
    assert len({tuple(targets) for targets in found}) == 8


@pytest.mark.parametrize("documents", ["cut", "padded", "packed"])
def test_every_row_has_something_to_predict_and_no_padding(corpus: Corpus, documents: str) -> None:
    for before, after in masked(corpus, 300, documents):
        chosen = after.targets != IGNORE_INDEX
        eligible = (before.targets != IGNORE_INDEX) & ~np.isin(before.targets, SPECIAL)
        assert chosen.any() == eligible.any()
        assert not (chosen & ~eligible).any()


def test_a_batch_of_nothing_to_predict_divides_by_one(corpus: Corpus, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.full(40, SPECIAL[0], np.uint16))
    nothing = Corpus(
        tmp_path / "tokens.npy", 40, "uint16", "", "", num_ids=MASK, mask_token=MASK, special_tokens=SPECIAL
    )
    samples = CorpusSamples(configure("cut", "masked"), nothing)
    assert samples.num_valid_targets(0) == 1
    assert (samples.sample(0, 0).targets == IGNORE_INDEX).all()


def test_evaluations_mask_the_same(corpus: Corpus) -> None:
    samples = HeldOutSamples(configure("padded", "masked"), corpus)
    assert [samples.sample(0, n).targets.tolist() for n in range(4)] == [
        samples.sample(7, n).targets.tolist() for n in range(4)
    ]


def test_tensors_are_integers(corpus: Corpus) -> None:
    config = configure("packed", "masked")
    tokens, (targets, _) = next(step_micro_batches(config, CorpusSamples(config, corpus), 0, 0))
    assert tokens.dtype == targets.dtype == torch.int64


# --- training


@pytest.mark.parametrize("name", [name for name in MODELS if " " not in name])
@pytest.mark.parametrize("documents", ["padded", "packed"])
def test_documents_train_as_on_their_own(corpus: Corpus, name: str, documents: str) -> None:
    """The loss and every gradient of a step, beside those of each document alone, without any padding."""
    model = MODELS[name].model_copy(update={"vocab_size": MASK + 1})
    objective = "causal" if model.causal else "masked"
    config = configure(documents, objective, "train.global_batch_size=6", "train.micro_batch_size=2")
    config = config.model_copy(update={"model": model})
    samples, state = CorpusSamples(config, corpus), random_state(model, dtype=torch.float64)
    engine = TorchEngine(config, lambda _: 0.0, state.__getitem__, dtype=torch.float64)
    tell_documents(engine.context, config, samples)
    found: dict[str, torch.Tensor] = {}
    engine.observers.append(Before("optimizer", lambda: found.update(engine.gradients())))
    loss = engine.train_step(step_micro_batches(config, samples, 0, step=0))

    alone = build_layers(model, TensorParallel.single()).double()
    fill(alone, model, state, TensorParallel.single())
    total, num_targets = torch.zeros((), dtype=torch.float64), 0
    for number in range(6):
        row, first = samples.sample(0, number), 0
        for length in samples.lengths(0, number):
            tokens, targets = (torch.from_numpy(part[None, first : first + length]) for part in row)
            total = total + F.cross_entropy(alone(tokens)[0], targets[0], ignore_index=IGNORE_INDEX, reduction="sum")
            num_targets += int((targets >= 0).sum())
            first += length
    (total / num_targets).backward()
    assert loss == pytest.approx(total.item() / num_targets, rel=1e-12)
    for key, parameter in alone.named_parameters():
        assert parameter.grad is not None
        assert relative_error(found[key], parameter.grad) < 1e-10 or found[key].abs().max() < 1e-15, key


@pytest.mark.parametrize("documents", ["padded", "packed"])
def test_an_evaluation_has_documents_of_its_own(corpus: Corpus, documents: str) -> None:
    """Its loss is that of held-out documents on their own, also between two steps, which go on with theirs."""
    config = configure(documents, "masked", "train.eval_samples=3", "train.micro_batch_size=2", "model.dropout=0")
    engine = TorchEngine(config, lambda _: 0.0, dtype=torch.float64)
    samples, held_out = CorpusSamples(config, corpus), HeldOutSamples(config, corpus)
    tell_documents(engine.context, config, samples)
    told = engine.context.documents, engine.context.shares
    losses = [engine.train_step(step_micro_batches(config, samples, 0, 0))]
    evaluated = Evaluation(config, corpus, engine, rank=0).loss()
    assert (engine.context.documents, engine.context.shares) == told
    engine.steps_taken = 0  # the learning rate is 0, so the step can be taken again
    losses.append(engine.train_step(step_micro_batches(config, samples, 0, 0)))
    assert losses[0] == losses[1]
    engine.context.documents = None
    engine.model.eval()
    total, num_targets = 0.0, 0
    for number in range(3):
        row, first = held_out.sample(0, number), 0
        for length in held_out.lengths(0, number):
            tokens, targets = (torch.from_numpy(part[None, first : first + length]) for part in row)
            total += float(engine.losses(tokens, targets))
            num_targets += int((targets != IGNORE_INDEX).sum())
            first += length
    assert evaluated == pytest.approx(total / num_targets, rel=1e-12)


def test_documents_are_drawn_evenly(corpus: Corpus) -> None:
    samples = CorpusSamples(configure("padded"), corpus)
    drawn = Counter(int(samples.sample(step, n).inputs[0]) // 10 for step in range(50) for n in range(100))
    expected = 5000 / len(drawn)
    degrees = len(drawn) - 1
    assert degrees > 40
    chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # four deviations of its distribution


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [("data.documents=packed", True), ("data.documents=padded", False), ("data.documents=cut", False)],
)
def test_dtensor_has_no_masks(overrides: str, is_refused: bool) -> None:
    layout = ["model=gpt2_tiny", "parallel.engine=dtensor", "parallel.tp=2", overrides]
    if not is_refused:
        assert not make_config(*layout).masks_documents
        return
    with pytest.raises(
        ConfigError, match=r"engine=dtensor has no masks for data.documents=packed; use data.documents="
    ):
        make_config(*layout)


def test_one_document_can_not_be_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("one")
    given = ["model=gpt2_tiny", "data.documents=packed", f"data.path={tmp_path / 'a.txt'}"]
    data_identity(make_config(*given))
    with pytest.raises(
        ConfigError, match=r"one document only, .* can hold out none; give more, or train.eval_interval=0"
    ):
        data_identity(make_config(*given, "train.eval_interval=1"))


@pytest.mark.parametrize("documents", ["cut", "padded", "packed"])
def test_rows_of_parity_checks_fit_however_short_they_are(documents: str) -> None:
    for length in range(1, 30):
        config = configure(documents, "masked", f"train.sequence_length={length}")
        samples = MaskedSamples(config)
        for number in range(8):
            lengths, row = samples.lengths(0, number), samples.sample(0, number)
            assert min(lengths) > 0
            assert sum(lengths) <= length
            assert (row.targets[sum(lengths) :] == IGNORE_INDEX).all()


def test_a_mean_of_means_would_be_another_loss(corpus: Corpus) -> None:
    """What the loss is not: micro-batches of few targets would count as much as those of many."""
    config = configure("padded", "causal", "train.global_batch_size=8", "train.micro_batch_size=1")
    counts = [sum(CorpusSamples(config, corpus).lengths(0, number)) for number in range(8)]
    losses = np.arange(8.0)
    assert len(set(counts)) > 3
    batches = step_micro_batches(config, CorpusSamples(config, corpus), 0, 0)
    weights = [float(weight) for _, (_, weight) in batches]
    weighted = np.mean([w * loss * n for w, loss, n in zip(weights, losses, counts, strict=True)])
    assert weighted == pytest.approx(np.average(losses, weights=counts), rel=1e-6)
    assert weighted != pytest.approx(losses.mean(), rel=1e-2)
