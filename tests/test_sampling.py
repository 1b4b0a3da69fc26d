"""Next tokens against argmax, softmax in float64 and the logits processors of transformers, in every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranks_sampling
import torch
import transformers
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.model.groups import TensorParallel
from harness.model.sampling import Sampler
from harness.spec.config import Generate

SINGLE = TensorParallel.single()


def sampler(vocab_size: int, **values: Any) -> Sampler:
    return Sampler(Generate(**values), vocab_size, SINGLE)


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(logits: Tensor, count: int, **values: Any) -> Tensor:
    """Tokens of as many sequences, all from the same scores: [count]."""
    rows = logits.float().expand(count, -1).clone()
    return sampler(len(logits), **values).choose(rows, range(count), [5] * count, None)


def probability(counts: Tensor, expected: Tensor) -> float:
    """Of a chi-square as large as that of `counts` or larger; what is expected less than 5 times is one class."""
    rare = expected < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum().reshape(1)))
        expected = torch.cat((expected[~rare], expected[rare].sum().reshape(1)))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = normal(50, 1000).to(dtype)
    logits[:, 400] = logits[:, 700] = 20  # equal: the first
    logits[::2, 900] = 30
    expected = logits.argmax(dim=-1)
    chosen = sampler(1000, top_k=3, top_p=0.1).choose(logits, range(50), range(50), None)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected.tolist() == [900, 400] * 25


def test_greedy_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [-1.0, -1.5, -2.5]])
    seen = torch.tensor([[True, False, False], [True, False, True]])
    assert sampler(3, repetition_penalty=1.6).choose(logits.clone(), [0, 1], [0, 0], seen).tolist() == [1, 1]
    assert sampler(3, repetition_penalty=1.4).choose(logits, [0, 1], [0, 0], seen).tolist() == [0, 0]


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 37, 1000])
@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float32), (0.6, torch.bfloat16), (3.0, torch.float64)])
def test_drawn_as_softmax(vocab_size: int, temperature: float, dtype: torch.dtype) -> None:
    """The 20,000 tokens of as many sequences, and those of one sequence at as many positions."""
    count, logits = 20_000, normal(vocab_size, seed=vocab_size).to(dtype)
    expected = count * (logits.double() / temperature).softmax(dim=-1)
    chooser = sampler(vocab_size, temperature=temperature)
    numbers, same = range(count), [3] * count
    for samples, positions in ((numbers, same), (same, numbers)):
        chosen = chooser.choose(logits.expand(count, -1).clone(), samples, positions, None)
        counts = chosen.bincount(minlength=vocab_size)
        assert len(counts) == vocab_size
        if vocab_size > 1:
            assert probability(counts, expected) > 0.001


def test_draws_are_independent() -> None:
    """Of one sequence at the next position, of the next sequence, with another seed: all pairs by softmax."""
    count, logits = 20_000, normal(6, seed=1, scale=0.5)
    pair = logits.softmax(dim=-1)
    expected = count * (pair.unsqueeze(1) * pair).flatten()
    rows, chooser = logits.expand(count, -1).float(), sampler(6, temperature=1.0, seed=1)
    numbers = torch.arange(count)

    def tokens(by: Sampler, samples: Tensor, positions: Tensor) -> Tensor:
        return by.choose(rows.clone(), samples.tolist(), positions.tolist(), None)

    one = tokens(chooser, numbers, numbers % 100)
    others = {
        "position": tokens(chooser, numbers, numbers % 100 + 1),
        "sample": tokens(chooser, numbers + 1, numbers % 100),
        "seed": tokens(sampler(6, temperature=1.0, seed=2), numbers, numbers % 100),
    }
    for name, other in others.items():
        assert probability((6 * one + other).bincount(minlength=36), expected) > 0.001, name
    assert tokens(chooser, numbers, numbers % 100).tolist() == one.tolist()


def test_a_token_depends_on_no_other_row() -> None:
    logits = normal(6, 500).float()
    chooser = sampler(500, temperature=1.0)
    together = chooser.choose(logits.clone(), range(6), range(10, 16), None)
    alone = [chooser.choose(logits[row : row + 1].clone(), [row], [10 + row], None).item() for row in (5, 2, 0)]
    assert together[[5, 2, 0]].tolist() == alone


@pytest.mark.parametrize("values", [{"top_k": 7}, {"top_p": 0.7}, {"top_k": 12, "top_p": 0.8}])
def test_drawn_among_those_that_remain(values: dict[str, Any]) -> None:
    logits = normal(100, seed=3)
    kept = filtered_by_transformers(logits.unsqueeze(0), None, Generate(temperature=0.9, **values))[0]
    counts = draws(logits, 20_000, temperature=0.9, **values).bincount(minlength=100)
    assert torch.equal(counts > 0, kept > -math.inf)
    remain = kept > -math.inf
    assert probability(counts[remain], 20_000 * kept.softmax(dim=-1)[remain]) > 0.001


def filtered_by_transformers(logits: Tensor, seen: Tensor | None, values: Generate) -> Tensor:
    """[rows, vocab_size], -inf where a token is out."""
    rows = []
    for row in range(len(logits)):
        tokens = torch.arange(logits.shape[-1]) if seen is None else seen[row].nonzero().flatten()
        processors: list[Any] = []
        if seen is not None and len(tokens):
            processors.append(transformers.RepetitionPenaltyLogitsProcessor(values.repetition_penalty))
        processors.append(transformers.TemperatureLogitsWarper(values.temperature))
        if values.top_k:
            processors.append(transformers.TopKLogitsWarper(values.top_k))
        if values.top_p < 1:
            processors.append(transformers.TopPLogitsWarper(values.top_p))
        scores = logits[row : row + 1].clone()
        for processor in processors:
            scores = processor(tokens.unsqueeze(0), scores)
        rows.append(scores)
    return torch.cat(rows)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(1, 60),
    equal=st.booleans(),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1e-9, 0.1, 0.45, 0.9, 0.99, 1.0]) | st.floats(0.01, 1),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_what_remains_is_what_transformers_leaves(
    seed: int, vocab_size: int, equal: bool, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    """Of equal scores at the border of top-p, of which transformers keeps some by their order, all remain."""
    generator = torch.Generator().manual_seed(seed)
    logits = normal(3, vocab_size, seed=seed)
    logits = logits.round() if equal else logits
    seen = torch.rand(logits.shape, generator=generator) < 0.3 if penalty != 1 else None
    values = Generate(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    theirs = filtered_by_transformers(logits, seen, values)

    chooser = Sampler(values, vocab_size, SINGLE)
    scores = chooser.adjusted(logits.clone(), seen)
    lowest = chooser.lowest(scores)
    ours = scores if lowest is None else scores.masked_fill(scores < lowest, -math.inf)

    border = theirs.masked_fill(theirs == -math.inf, math.inf).amin(dim=-1, keepdim=True)
    assert torch.equal(ours, torch.where(scores == border, scores, theirs))
    if not equal:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = normal(2000, 300).to(dtype)
    chooser = sampler(300, temperature=0.7, top_k=100, top_p=0.95)
    tokens = [chooser.choose(rows, range(2000), [0] * 2000, None).tolist() for rows in (logits.float(), logits)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("top_p", [0.2, 0.499999, 0.5, 0.500001, 0.9])
def test_the_fewest_tokens_that_make_up_top_p(top_p: float) -> None:
    """Probabilities 1/2, 1/4, 1/4, exactly: the first is enough for 0.5."""
    logits = torch.tensor([[0.0, -math.log(2), -math.log(2)]], dtype=torch.float64)
    lowest = sampler(3, temperature=1.0, top_p=top_p).lowest(logits)
    assert lowest is not None
    assert int((logits >= lowest).sum()) == (1 if top_p <= 0.5 else 3)


def test_equal_scores_beyond_top_k_count_for_top_p() -> None:
    """Three of 1/4 remain of top-k = 2, beside 1/4 that is the best: 0.6 of that needs them."""
    logits = torch.tensor([[0.0, 1e-6, 0.0, 0.0, -20.0]], dtype=torch.float64)
    for top_p, number in ((0.24, 1), (0.6, 4)):
        lowest = sampler(5, temperature=1.0, top_k=2, top_p=top_p).lowest(logits)
        assert lowest is not None
        assert int((logits >= lowest).sum()) == number


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_scores_and_temperatures(temperature: float, scale: float) -> None:
    """The best token where nothing else is likely, any where all are; never padding, whatever is there."""
    logits = normal(2000, 37, scale=scale).float()
    padded = torch.cat((logits, torch.full((2000, 3), 1e6)), dim=-1)
    chosen = sampler(37, temperature=temperature).choose(padded, range(2000), [0] * 2000, None)
    assert chosen.max() < 37
    if temperature < 1e-10:
        assert torch.equal(chosen, logits.argmax(dim=-1))
    elif temperature > 1e10:
        assert probability(chosen.bincount(minlength=37), torch.full((37,), 2000 / 37)) > 0.001


def test_two_equal_scores_that_are_large_are_drawn_alike() -> None:
    """Noise isn't rounded away beside them."""
    logits = torch.full((37,), -1e7)
    logits[[3, 4, 30]] = 1e7
    counts = draws(logits, 3000, temperature=0.01).bincount(minlength=37)
    assert probability(counts[[3, 4, 30]], torch.full((3,), 1000.0)) > 0.001


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 2.0},
    ],
)
def test_nothing_waits_for_a_device(values: dict[str, Any]) -> None:
    """Tensors without values, on a device that is not the CPU: none is read, and none is mixed with the CPU's."""
    logits, seen = torch.empty(3, 40, device="meta"), torch.empty(3, 40, device="meta", dtype=torch.bool)
    chosen = sampler(37, **values).choose(logits, range(3), range(3), seen)
    assert (chosen.device.type, chosen.shape, chosen.dtype) == ("meta", (3,), torch.int64)


CASES: list[dict[str, Any]] = [
    {"vocab_size": vocab_size, "settings": values, "equal": equal}
    for equal in (False, True)
    for vocab_size in (5, 37, 1009)
    for values in (
        {},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 10},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5},
    )
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[int]]]]:
    answer: list[dict[str, list[list[int]]]] = run_ranks(
        4, "ranks_sampling", CASES, tmp_path_factory.mktemp("sampling")
    )
    return answer


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_layout_draws_the_same(layouts: list[dict[str, list[list[int]]]], number: int) -> None:
    """2,000 tokens; padding, borders inside blocks and a rank of padding alone are among the cases."""
    case = CASES[number]
    expected = ranks_sampling.choose(case, SINGLE)
    assert max(expected) < case["vocab_size"]
    assert len(set(expected)) > min(case["vocab_size"], 30) - 2
    assert {tp: len(ranks) for tp, ranks in layouts[number].items()} == {"2": 4, "3": 3, "4": 4}
    for tp, ranks in layouts[number].items():
        for tokens in ranks:
            assert tokens == expected, tp


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_of_no_numbers_none_is_chosen(settings: dict[str, Any]) -> None:
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = torch.nan
    chosen = sampler(17, **settings).choose(logits, [0, 1, 2], [4, 4, 4], None)
    assert (chosen < 0).tolist() == [False, True, False]


@pytest.mark.parametrize("penalty", [1e38, 1e39, 1e300])
def test_a_penalty_beyond_all_numbers_is_a_ban(penalty: float) -> None:
    logits, seen = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]]), torch.zeros(1, 6, dtype=torch.bool)
    seen[0, [0, 1, 5]] = True
    assert sampler(6, repetition_penalty=penalty).choose(logits, [0], [3], seen).tolist() == [2]
