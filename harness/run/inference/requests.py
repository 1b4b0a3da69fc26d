"""Requests: when they come, what became of each, and the moments that their times are made of."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import sub
from typing import NamedTuple

import numpy as np

from harness.prompts import Prompt
from harness.record.inference import InferenceRecord, PhaseRecord
from harness.spec.batching import Chosen, Work
from harness.spec.config import Generate


class Requests(NamedTuple):
    """What is asked for, the same on all ranks."""

    prompts: list[Prompt]
    stop_tokens: list[int]

    @property
    def numbers(self) -> list[int]:
        """Of the prompts that something can be generated from."""
        return [number for number, prompt in enumerate(self.prompts) if not prompt.problem]

    @property
    def tokens(self) -> list[list[int]]:
        """Of these prompts."""
        return [self.prompts[number].tokens for number in self.numbers]


def arrival_seconds(settings: Generate, count: int) -> list[float]:
    """When each request comes, in seconds from the begin: all at 0, or at the moments of a Poisson process, [count]."""
    if settings.request_rate is None:
        return [0.0] * count
    gaps = np.random.default_rng([settings.seed, 1]).exponential(1 / settings.request_rate, count)
    return [float(moment) for moment in np.cumsum(gaps)]


class Journal:
    """Moments of the requests of one measurement, on rank 0; it begins with the first question what has come.

    Args:
        arrivals: of each request, in seconds from the begin.
        idle: called at least every second while nothing is to be done.
    """

    def __init__(self, arrivals: Sequence[float], idle: Callable[[], object] = lambda: None) -> None:
        self._arrivals, self._idle = arrivals, idle
        self._coming = deque(range(len(arrivals)))
        self._start: float | None = None
        self.begun: dict[int, float] = {}
        """When the first pass of a request began."""
        self.tokens: list[list[float]] = [[] for _ in arrivals]
        """When each token of a request was chosen."""

    @property
    def now(self) -> float:
        """Seconds since the begin."""
        if self._start is None:
            self._start = time.monotonic()
        return time.monotonic() - self._start

    def arrive(self, waits: bool) -> list[int]:
        """Requests that have come since this was asked last; with `waits` the next one at least, if there is one."""
        while waits and self._coming and (left := self._arrivals[self._coming[0]] - self.now) > 0:
            self._idle()
            time.sleep(min(left, 1.0))
        came = []
        while self._coming and self._arrivals[self._coming[0]] <= self.now:
            came.append(self._coming.popleft())
        return came

    def age(self, request: int) -> float:
        """Seconds since a request came."""
        return self.now - self._arrivals[request]

    def began(self, work: Work) -> None:
        """A pass begins."""
        for row in work.rows:
            self.begun.setdefault(row.request, self.now)

    def told(self, chosen: Sequence[Chosen], waited_seconds: float = 0.0) -> None:
        """Tokens have come.

        Args:
            waited_seconds: since they were chosen; rank 0 looks at them when it is their group's turn.
        """
        moment = self.now - waited_seconds
        for request, _, _ in chosen:
            self.tokens[request].append(moment)

    def record(
        self, number: int, peak_memory_bytes: int, prefill: PhaseRecord | None, decode: PhaseRecord | None
    ) -> InferenceRecord:
        """All of it.

        Args:
            prefill, decode: where they were measured one after the other: the time between them is no sequence's.
        """
        moments = [of for of in self.tokens if of]
        began_with = 0 if prefill is None else 1
        phases = [phase.seconds for phase in (prefill, decode) if phase is not None]
        return InferenceRecord(
            number=number,
            seconds=sum(phases) if phases else max(of[-1] for of in moments) - min(self._arrivals),
            tokens=sum(map(len, self.tokens)),
            peak_memory_bytes=peak_memory_bytes,
            first_token_seconds=[of[0] - self._arrivals[r] for r, of in enumerate(self.tokens) if of],
            inter_token_seconds=[gap for of in moments for gap in map(sub, of[began_with + 1 :], of[began_with:])],
            queue_seconds=[begun - self._arrivals[request] for request, begun in sorted(self.begun.items())],
            prefill=prefill,
            decode=decode,
        )
