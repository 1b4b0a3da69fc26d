"""Micro-batches for one rank.

The global batch of a step is a list of samples 0..global_batch_size-1, and a sample is a pure function of
(seed, step, number). Micro-batch k of data-parallel rank d holds the samples
(k x dp + d) x micro_batch_size + 0..micro_batch_size-1, so that every layout and every micro-batch size
trains on the same samples in the same step.

A sample is a row of positions: a window of a text (`data.documents=cut`), a document (padded), or several (packed), and
padding behind them. With `train.objective=causal` the target of a position is the next token of its document, with
masked (arXiv 1810.04805, section 3.1) it is the token itself, where that was masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from harness.corpus import Corpus, document_lengths, draw, load_tokens, sample_start, tokens_besides
from harness.documents import Row, make_rows
from harness.model.context import Documents, PassContext
from harness.model.loss import IGNORE_INDEX
from harness.spec.config import RunConfig
from harness.spec.counts import training_flops_per_token

MicroBatch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
Integers = npt.NDArray[np.int64]

MASKED, REPLACED, RANDOM = 0.15, 0.8, 0.1
"""Share of positions whose tokens are to be predicted; of these, what becomes a mask and what a random token."""


class Sample(NamedTuple):
    """A row."""

    inputs: Integers
    """Tokens `[sequence_length]`; 0 in padding."""
    targets: Integers
    """`[sequence_length]`; IGNORE_INDEX where there is nothing to learn."""


class Load(NamedTuple):
    """What a global batch has to compute."""

    tokens: int
    """Positions that are no padding."""
    pairs: int
    """Of positions of the same document."""
    flops: int
    """Of training on these tokens, each in its document, as `training_flops_per_token` counts them."""
    causal_flops: int
    """The same with the part of attention that a causal mask leaves."""


class Samples(Protocol):
    """Where samples come from."""

    def sample(self, step: int, number: int) -> Sample:
        """A row of the global batch."""

    def lengths(self, step: int, number: int) -> list[int]:
        """Positions of each document of a row; the rest is padding."""

    def num_valid_targets(self, step: int) -> int:
        """Targets of the global batch that the loss counts."""


class CorpusSamples:
    """Rows of a text, or of random tokens, drawn anew for each step."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config = config
        self._source = _source_of(config, corpus, held_out=False)
        self._mask = Masks(config, corpus) if config.train.objective == "masked" else None

    def _row(self, step: int, number: int) -> Any:
        seed, num_rows = self._config.train.seed, self._source.num_rows
        return (seed, step, number) if num_rows is None else sample_start(seed, step, number, num_rows)

    def sample(self, step: int, number: int) -> Sample:
        """A row of the global batch."""
        return _sample(self._config, self._source.documents(self._row(step, number)), self._mask, step, number)

    def lengths(self, step: int, number: int) -> list[int]:
        """Positions of each of its documents."""
        return self._source.lengths(self._row(step, number))

    def num_valid_targets(self, step: int) -> int:
        """All positions that are no padding, or those that were masked."""
        return _count_targets(self, self._config.train.global_batch_size, step, self._mask is not None)


class HeldOutSamples:
    """Rows that training never sees, the same at every evaluation, evenly spread over the held-out text."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config, self._source = config, _source_of(config, corpus, held_out=True)
        # Of documents each row once at most; of windows there are as many as one asks for.
        rows = self._source.num_rows if config.data.documents != "cut" else None
        self._count = min(config.train.eval_samples, rows or config.train.eval_samples)
        self._mask = Masks(config, corpus) if config.train.objective == "masked" else None

    def _row(self, number: int) -> Any:
        num_rows = self._source.num_rows
        if num_rows is None:
            return self._config.train.seed, -1, number
        return (num_rows - 1) * number // max(1, self._count - 1)

    def sample(self, step: int, number: int) -> Sample:
        """A row; past the last no target counts."""
        if number >= self._count:
            length = self._config.train.sequence_length
            return Sample(np.zeros(length, np.int64), np.full(length, IGNORE_INDEX))
        return _sample(self._config, self._source.documents(self._row(number)), self._mask, -1, number)

    def lengths(self, step: int, number: int) -> list[int]:
        """Positions of each of its documents."""
        return self._source.lengths(self._row(number)) if number < self._count else []

    def num_valid_targets(self, step: int) -> int:
        """Of all rows."""
        return self._num_targets

    @cached_property
    def _num_targets(self) -> int:
        return _count_targets(self, self._count, -1, self._mask is not None)


def _count_targets(samples: Samples, count: int, step: int, is_masked: bool) -> int:
    """At least 1, by which sums are divided."""
    if not is_masked:
        return sum(sum(samples.lengths(step, number)) for number in range(count))
    found = sum(int((samples.sample(step, number).targets != IGNORE_INDEX).sum()) for number in range(count))
    return max(1, found)


class _Source(Protocol):
    """Rows that samples are drawn from."""

    num_rows: int | None
    """None: one for every seed, step and number, which then stand for it."""

    def documents(self, row: Any) -> list[Integers]:
        """Tokens of each document of a row, with the one that is only predicted."""

    def lengths(self, row: Any) -> list[int]:
        """Positions of each."""


def _source_of(config: RunConfig, corpus: Corpus, held_out: bool) -> _Source:
    length, besides = config.train.sequence_length, tokens_besides(config.train.objective)
    if corpus.path is None:
        return _RandomRows(config, corpus)
    tokens = load_tokens(corpus.path)
    if config.data.documents == "cut":
        part = corpus.ranges(length)[held_out]
        return _Windows(tokens[part.start : part.stop], length, besides)
    rows = make_rows(document_lengths(corpus), length, besides, config.data.documents == "packed")
    return _DocumentRows(tokens, corpus, rows[held_out], besides)


class _Windows:
    """Of a text, whatever documents it has; a row for each place where one can begin."""

    def __init__(self, tokens: npt.NDArray[np.integer], length: int, besides: int) -> None:
        self._tokens, self._length, self._besides = tokens, length, besides
        self.num_rows: int | None = len(tokens) - length

    def documents(self, row: int) -> list[Integers]:
        """The window."""
        return [self._tokens[row : row + self._length + self._besides].astype(np.int64)]

    def lengths(self, row: int) -> list[int]:
        """All positions."""
        return [self._length]


class _DocumentRows:
    """Of whole documents."""

    def __init__(self, tokens: npt.NDArray[np.integer], corpus: Corpus, rows: Sequence[Row], besides: int) -> None:
        assert corpus.documents is not None
        self._tokens, self._places, self._end = tokens, load_tokens(corpus.documents), np.array(corpus.end, np.int64)
        self._rows, self._besides = rows, besides
        self.num_rows: int | None = len(rows)

    def documents(self, row: int) -> list[Integers]:
        """Whole, with their ends."""
        places = [self._places[k] for k in self._rows[row]]
        return [np.concatenate((self._tokens[a:b], self._end), dtype=np.int64) for a, b, _ in places]

    def lengths(self, row: int) -> list[int]:
        """Positions of each."""
        besides = self._besides - len(self._end)
        return [int(self._places[k][1] - self._places[k][0]) - besides for k in self._rows[row]]


class _RandomRows:
    """Of random tokens; documents have from 1 to all positions, each number as often."""

    num_rows: int | None = None

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._length, self._kind, self._num_ids = config.train.sequence_length, config.data.documents, corpus.num_ids
        self._besides = tokens_besides(config.train.objective)

    def documents(self, row: tuple[int, int, int]) -> list[Integers]:
        """As long as `lengths` says."""
        sizes = [length + self._besides for length in self.lengths(row)]
        tokens = (draw(sum(sizes), *row) % self._num_ids).astype(np.int64)
        return np.split(tokens, np.cumsum(sizes)[:-1])

    def lengths(self, row: tuple[int, int, int]) -> list[int]:
        """Of one document, or of as many as are drawn before one does not fit."""
        if self._kind == "cut":
            return [self._length]
        drawn = 1 + draw(1 if self._kind == "padded" else self._length, *row, "lengths") % self._length
        return [int(length) for length in drawn[np.cumsum(drawn) <= self._length]]


def _sample(config: RunConfig, documents: list[Integers], mask: Masks | None, step: int, number: int) -> Sample:
    """A row of documents, one behind the other."""
    length, besides = config.train.sequence_length, tokens_besides(config.train.objective)
    inputs, targets, first = np.zeros(length, np.int64), np.full(length, IGNORE_INDEX), 0
    for tokens in documents:
        own = slice(first, first + len(tokens) - besides)
        inputs[own], targets[own] = tokens[: len(tokens) - besides], tokens[besides:]
        first = own.stop
    sample = Sample(inputs, targets)
    return sample if mask is None else mask(sample, step, number)


class Masks:
    """Chooses what is to be predicted: the same of a sample wherever, and by whomever, it is computed.

    Of the positions that are neither padding nor special, a share of `MASKED` is chosen, and at least one. Of these
    most show the mask token, some a random one, and the rest what they are.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        assert corpus.mask_token is not None
        self._seed, self._mask_token, self._num_ids = config.train.seed, corpus.mask_token, corpus.num_ids
        self._special = np.array(corpus.special_tokens, np.int64)

    def __call__(self, sample: Sample, step: int, number: int) -> Sample:
        """Of a row whose targets are all its tokens."""
        tokens, length = sample.targets, len(sample.targets)
        choice, what, other = draw(3 * length, self._seed, step, number, "mask").reshape(3, length)
        eligible = (tokens != IGNORE_INDEX) & ~np.isin(tokens, self._special)
        shares = np.where(eligible, choice / 2.0**64, 1.0)
        chosen = shares < MASKED
        if not chosen.any() and eligible.any():
            chosen[shares.argmin()] = True
        kind = what / 2.0**64
        inputs = np.where(chosen & (kind < REPLACED), self._mask_token, sample.inputs)
        is_random = chosen & (kind >= REPLACED) & (kind < REPLACED + RANDOM)
        inputs = np.where(is_random, (other % self._num_ids).astype(np.int64), inputs)
        return Sample(inputs, np.where(chosen, tokens, IGNORE_INDEX))


def micro_batches(config: RunConfig, samples: Samples, dp_rank: int, first_step: int = 0) -> Iterator[MicroBatch]:
    """Endless micro-batches of a data-parallel rank, step after step (counted from 0)."""
    step = first_step
    while True:
        yield from step_micro_batches(config, samples, dp_rank, step)
        step += 1


def step_micro_batches(config: RunConfig, samples: Samples, dp_rank: int, step: int) -> Iterator[MicroBatch]:
    """The micro-batches of one step.

    Yields:
        (tokens `[micro_batch_size, sequence_length]`, (targets of the same shape, weight)). The sum of
        token losses times weight, averaged over micro-batches and replicas as DeepSpeed does, is the sum
        of token losses of the global batch over its number of valid targets.
    """
    weight = torch.tensor(config.num_micro_batches * config.parallel.dp / samples.num_valid_targets(step))
    for k in range(config.num_micro_batches):
        rows = [samples.sample(step, number) for number in numbers_of(config, k, dp_rank)]
        tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        yield tokens, (targets, weight)


def numbers_of(config: RunConfig, micro_batch: int, dp_rank: int) -> range:
    """Of the samples of a micro-batch, in the global batch."""
    size = config.train.micro_batch_size
    first = (micro_batch * config.parallel.dp + dp_rank) * size
    return range(first, first + size)


def load_of(config: RunConfig, samples: Samples, step: int) -> Load:
    """What the global batch of a step has to compute."""
    lengths = [n for number in range(config.train.global_batch_size) for n in samples.lengths(step, number)]

    @cache
    def flops(length: int, causal: bool) -> int:
        return length * training_flops_per_token(config.model, length, causal)

    sums = (sum(flops(length, causal) for length in lengths) for causal in (False, True))
    return Load(sum(lengths), sum(length * length for length in lengths), *sums)


def tell_documents(context: PassContext, config: RunConfig, samples: Samples) -> None:
    """Let the layers of a rank know the documents of their rows, which most stages see nothing else of."""
    context.documents = documents_of(config, samples)
    if config.data.documents != "cut":
        context.shares = shares_of(config, samples)


def documents_of(config: RunConfig, samples: Samples) -> Documents | None:
    """For `PassContext.documents`; None where no token would see anything else without."""
    if not config.masks_documents:
        return None
    length = config.train.sequence_length

    def documents(step: int, micro_batch: int, dp_rank: int) -> torch.Tensor:
        rows = [samples.lengths(step, number) for number in numbers_of(config, micro_batch, dp_rank)]
        numbers = [np.repeat(np.arange(len(row) + 1), [*row, length - sum(row)]) for row in rows]
        return torch.from_numpy(np.stack(numbers))

    return documents


def shares_of(config: RunConfig, samples: Samples) -> Callable[[int, int, int], float]:
    """For `PassContext.shares`: how much of a micro-batch is no padding."""

    def share(step: int, micro_batch: int, dp_rank: int) -> float:
        numbers = numbers_of(config, micro_batch, dp_rank)
        tokens = sum(sum(samples.lengths(step, number)) for number in numbers)
        return tokens / (len(numbers) * config.train.sequence_length)

    return share
