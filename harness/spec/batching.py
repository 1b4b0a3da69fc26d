"""Which sequences are worked on when: groups of slots that go round the stages, and requests that enter and leave.

A sequence has a slot, its place in the cache of every stage, while it is worked on. Slots are dealt to groups. The
first stage takes the groups in turn. It waits for the tokens of what a group did last, and begins what the group does
next: to compute (part of) the prompts of sequences that have entered, its prefill, and a token more of all others, its
decode. With as many groups as stages all stages work, each on another group. A sequence that has ended leaves its slot
to the next that waits (continuous batching, as in Orca, OSDI 2022); a long prompt is computed in chunks, so that
others get their tokens meanwhile (arXiv 2308.16369).

Nothing here knows what a token is worth or what time it is: the same code decides for a model, for emulated stages, and
for the simulation of either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, Protocol

NO_NUMBERS = "error: the scores of its next token are no numbers (NaN); use other weights, or train.precision=fp32"
"""Why a sequence ends of which no token can be chosen."""
Phase = Literal["prefill", "decode"]


class Row(NamedTuple):
    """What a pass computes of one sequence: the tokens at positions `start` to `end` (excluded)."""

    slot: int
    request: int
    start: int
    end: int
    chooses: bool
    """Whether the token at `end` is chosen: the prompt is done."""


@dataclass(frozen=True)
class Work:
    """One pass of a group through all stages."""

    number: int
    """Counted from 0 over all passes."""
    phase: Phase
    rows: tuple[Row, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(row.end - row.start for row in self.rows)

    @property
    def choosing(self) -> list[Row]:
        """Rows whose next token is chosen."""
        return [row for row in self.rows if row.chooses]


class Chosen(NamedTuple):
    """A token that a sequence got."""

    request: int
    token: int
    """-1: none, see `NO_NUMBERS`."""
    reason: str | None
    """Why it was the last one; None: it was not."""


class Feed(Protocol):
    """What decides what goes round."""

    def turn(self) -> tuple[list[Work], Iterable[Work]] | None:
        """Passes whose tokens must come back first, in order, and then those that begin; None: that was all."""

    def deliver(self, work: Work, tokens: Sequence[int]) -> list[Chosen]:
        """The tokens of a pass have come back, one for each row that chooses."""


class Passes:
    """Passes that depend on nothing, as prompts of which no token is chosen."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works: Sequence[Work] | None = works

    def turn(self) -> tuple[list[Work], Iterable[Work]] | None:
        """All at once."""
        works, self._works = self._works, None
        return None if works is None else ([], works)

    def deliver(self, work: Work, tokens: Sequence[int]) -> list[Chosen]:
        """No row chooses."""
        raise AssertionError(f"{work} chooses nothing")


@dataclass
class _Sequence:
    request: int
    slot: int
    done: int = 0
    """Positions that are computed, or under way."""
    tokens: int = 0
    """Chosen so far."""


@dataclass
class _Group:
    slots: list[int]
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    """By slot, in the order they entered."""
    under_way: deque[Work] = field(default_factory=deque)
    """Whose tokens have not come back."""


class Batcher:
    """The feed of sequences that enter and leave.

    Args:
        prompts: number of tokens of each request's prompt.
        limits: the most tokens that each may get.
        num_slots: sequences at a time.
        num_groups: of slots.
        chunk: tokens of a prompt that a pass takes at most; None: all.
        prefill_rows: prompts that a pass takes at most; None: all of a group.
        ends: (request, token) -> why the sequence ends with this token; None: it goes on.
        first: number of the first pass.
        arrivals: asked before each turn for requests that have come; with True, where there is nothing else to do, it
            waits for the next, and returns none if there will be none.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        limits: Sequence[int],
        num_slots: int,
        num_groups: int,
        chunk: int | None = None,
        prefill_rows: int | None = None,
        ends: Callable[[int, int], str | None] = lambda *_: None,
        arrivals: Callable[[bool], Sequence[int]] = lambda _: (),
        first: int = 0,
    ) -> None:
        self._prompts, self._limits, self._ends, self._arrivals = prompts, limits, ends, arrivals
        self._chunk, self._prefill_rows = chunk or max(prompts, default=1), prefill_rows or num_slots
        bounds = [0, *accumulate(num_slots // num_groups + (g < num_slots % num_groups) for g in range(num_groups))]
        self._groups = [_Group(list(range(*bound))) for bound in pairwise(bounds)]
        self._turn = 0
        self._waiting: deque[int] = deque()
        self._number = first
        self.phases: frozenset[Phase] = frozenset(("prefill", "decode"))
        """What may begin; with one of them alone, `turn` ends when nothing of it is left."""

    def offer(self, requests: Iterable[int]) -> None:
        """Requests have come, and wait for slots."""
        self._waiting.extend(requests)

    def turn(self) -> tuple[list[Work], Iterator[Work]] | None:
        """The next group's turn: passes whose tokens must come back first, in order, and then those that begin.

        What begins is decided when it is asked for: `deliver` the tokens before.

        Returns:
            None: no group has anything to wait for or to begin.
        """
        came = self._arrivals(False)
        while True:
            self.offer(came)
            for _ in self._groups:
                group = self._groups[self._turn]
                self._turn = (self._turn + 1) % len(self._groups)
                if group.under_way or self._can_begin(group):
                    return self._awaited(group), self._begin(group)
            if not (came := self._arrivals(True)):
                return None

    def _awaited(self, group: _Group) -> list[Work]:
        """Without decode nothing depends on the tokens of prefill: they are awaited when all of it has begun.

        Tokens come back in the order of their passes, whatever group they are of.
        """
        if self.phases != {"prefill"}:
            return list(group.under_way)
        if any(map(self._can_begin, self._groups)):
            return []
        return sorted((work for of in self._groups for work in of.under_way), key=lambda work: work.number)

    def _can_begin(self, group: _Group) -> bool:
        prefill = any(self._in_prefill(s) for s in group.sequences.values())
        enters = bool(self._waiting) and len(group.sequences) < len(group.slots)
        decode = any(self._in_decode(s) for s in group.sequences.values())
        return ("prefill" in self.phases and (prefill or enters)) or ("decode" in self.phases and decode)

    def _in_prefill(self, sequence: _Sequence) -> bool:
        return sequence.done < self._prompts[sequence.request]

    def _in_decode(self, sequence: _Sequence) -> bool:
        """Whether its last token has come back and is not computed yet."""
        return sequence.tokens > 0 and sequence.done == self._prompts[sequence.request] + sequence.tokens - 1

    def _begin(self, group: _Group) -> Iterator[Work]:
        if "prefill" in self.phases:
            for slot in group.slots:
                if self._waiting and slot not in group.sequences:
                    group.sequences[slot] = _Sequence(self._waiting.popleft(), slot)
            beginning = [s for s in group.sequences.values() if self._in_prefill(s)][: self._prefill_rows]
            if beginning:
                yield self._pass(group, "prefill", beginning)
        if "decode" in self.phases:
            going = [s for s in group.sequences.values() if self._in_decode(s)]
            if going:
                yield self._pass(group, "decode", going)

    def _pass(self, group: _Group, phase: Phase, sequences: Sequence[_Sequence]) -> Work:
        rows = []
        for sequence in sorted(sequences, key=lambda s: s.slot):
            known = self._prompts[sequence.request] + sequence.tokens
            end = min(sequence.done + self._chunk, known) if phase == "prefill" else known
            rows.append(Row(sequence.slot, sequence.request, sequence.done, end, end == known))
            sequence.done = end
        work = Work(self._number, phase, tuple(rows))
        self._number += 1
        if work.choosing:
            group.under_way.append(work)
        return work

    def deliver(self, work: Work, tokens: Sequence[int]) -> list[Chosen]:
        """The tokens of a pass have come back, one for each row that chooses; sequences that end leave their slots."""
        group = next(group for group in self._groups if work in group.under_way)
        group.under_way.remove(work)
        chosen = []
        for row, token in zip(work.choosing, tokens, strict=True):
            sequence = group.sequences[row.slot]
            sequence.tokens += 1
            reason = NO_NUMBERS if token < 0 else self._ends(row.request, token)
            if reason is None and sequence.tokens >= self._limits[row.request]:
                reason = "length"
            if reason is not None:
                del group.sequences[row.slot]
            chosen.append(Chosen(row.request, token, reason))
        return chosen
