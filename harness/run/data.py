"""Micro-batches for one rank.

The global batch of a step is a list of samples 0..global_batch_size-1, and a sample is a pure function of
(seed, step, number). Micro-batch k of data-parallel rank d holds the samples
(k x dp + d) x micro_batch_size + 0..micro_batch_size-1, so that every layout and every micro-batch size
trains on the same samples in the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from harness.corpus import Corpus, load_tokens, sample
from harness.model.loss import IGNORE_INDEX
from harness.spec.config import RunConfig

MicroBatch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class Samples(Protocol):
    """Where samples come from."""

    def sample(self, step: int, number: int) -> npt.NDArray[np.int64]:
        """Tokens `[sequence_length + 1]` of a sample; IGNORE_INDEX marks targets the loss leaves out."""

    def num_valid_tokens(self, step: int) -> int:
        """Targets of the global batch that the loss counts."""


class CorpusSamples:
    """Windows of a text, or random tokens; every target counts."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config = config
        self._tokens = None
        if corpus.path is not None:
            training, _ = corpus.ranges(config.train.sequence_length)
            self._tokens = load_tokens(corpus.path)[training.start : training.stop]

    def sample(self, step: int, number: int) -> npt.NDArray[np.int64]:
        """Tokens `[sequence_length + 1]`."""
        train, vocab_size = self._config.train, self._config.model.vocab_size
        return sample(self._tokens, train.seed, step, number, train.sequence_length, vocab_size)

    def num_valid_tokens(self, step: int) -> int:
        """All targets of the global batch."""
        return self._config.train.global_batch_size * self._config.train.sequence_length


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
        of token losses of the global batch over its number of valid tokens.
    """
    size, dp = config.train.micro_batch_size, config.parallel.dp
    weight = torch.tensor(config.num_micro_batches * dp / samples.num_valid_tokens(step))
    for k in range(config.num_micro_batches):
        first = (k * dp + dp_rank) * size
        tokens = torch.from_numpy(np.stack([samples.sample(step, n) for n in range(first, first + size)]))
        yield tokens[:, :-1].clamp(min=0), (tokens[:, 1:].contiguous(), weight)


class HeldOutSamples:
    """Samples that training never sees, the same at every evaluation, evenly spread over the held-out text."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._train, self._vocab_size = config.train, config.model.vocab_size
        self._tokens = None
        if corpus.path is not None:
            _, held_out = corpus.ranges(config.train.sequence_length)
            self._tokens = load_tokens(corpus.path)[held_out.start : held_out.stop]

    def sample(self, step: int, number: int) -> npt.NDArray[np.int64]:
        """Tokens `[sequence_length + 1]`; past the last sample no target counts."""
        length, count = self._train.sequence_length, self._train.eval_samples
        if number >= count:
            return np.full(length + 1, IGNORE_INDEX)
        if self._tokens is None:
            return sample(None, self._train.seed, -1, number, length, self._vocab_size)
        start = (len(self._tokens) - length - 1) * number // max(1, count - 1)
        return self._tokens[start : start + length + 1].astype(np.int64)

    def num_valid_tokens(self, step: int) -> int:
        """All targets of the samples."""
        return self._train.eval_samples * self._train.sequence_length
