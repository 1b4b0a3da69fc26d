"""Every request gets its tokens, each position is computed once, and no rule is broken on the way."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.spec.batching import NO_NUMBERS, Batcher, Chosen, Passes, Phase, Row, Work

STEPS = 100
"""Tokens of a request are STEPS request, STEPS request + 1, ..., so that each says whose it is."""


@dataclass
class Case:
    """What a batcher is given; `groups` and `phases` as a run of that many stages would have them."""

    prompts: list[int]
    limits: list[int]
    stops: list[int | None]
    """Tokens after which a request ends on its own; None: it doesn't."""
    num_slots: int
    num_groups: int
    chunk: int | None = None
    prefill_rows: int | None = None
    comes: list[int] = field(default_factory=list)
    """Requests that come with each question; when they are used up, the rest comes only while nothing is to be done."""
    alone: bool = False
    """All prefill that can be, then all decode that can be, and so on."""
    one_stage: bool = False
    """Tokens are there with the pass; else they come as late as can be: when they are awaited."""
    first: int = 0

    @property
    def counts(self) -> list[int]:
        """Tokens of each request."""
        return [min(limit, stop or limit) for limit, stop in zip(self.limits, self.stops, strict=True)]


@st.composite
def cases(draw: Any) -> Case:
    count = draw(st.integers(0, 9))
    num_slots = draw(st.integers(1, 6))

    def each(values: Any) -> Any:
        return draw(st.lists(values, min_size=count, max_size=count))

    return Case(
        prompts=each(st.integers(1, 9)),
        limits=each(st.integers(1, 5)),
        stops=each(st.none() | st.integers(1, 6)),
        num_slots=num_slots,
        num_groups=draw(st.integers(1, num_slots)),
        chunk=draw(st.none() | st.integers(1, 10)),
        prefill_rows=draw(st.none() | st.integers(1, num_slots)),
        comes=draw(st.lists(st.integers(0, 4), max_size=12) | st.just([count])),
        alone=draw(st.booleans()),
        one_stage=draw(st.booleans()),
        first=draw(st.integers(0, 3)),
    )


class Run:
    """Does what a batcher says, and checks it."""

    def __init__(self, case: Case) -> None:
        self.case, self.tokens, self.reasons = case, defaultdict[int, list[int]](list), dict[int, str]()
        self.works: list[Work] = []
        self._done = [0] * len(case.prompts)
        self._slot_of: dict[int, int] = {}
        self._living: dict[int, int] = {}
        """Request by slot."""
        self._entered: dict[int, list[int]] = defaultdict(list)
        """Requests in the order of their first passes, by group."""
        self._came: deque[int] = deque()
        self._coming, self._comes = deque(range(len(case.prompts))), deque(case.comes)
        self._line: deque[Work] = deque()
        """Passes whose tokens the last stage has sent."""
        slots = np.array_split(range(case.num_slots), case.num_groups)
        self._group_of = {int(slot): number for number, group in enumerate(slots) for slot in group}
        self.batcher = Batcher(
            case.prompts,
            case.limits,
            case.num_slots,
            case.num_groups,
            case.chunk,
            case.prefill_rows,
            self._ends,
            self._arrivals,
            case.first,
        )

    def all(self) -> Run:
        turns: list[frozenset[Phase]] = [frozenset(["prefill"]), frozenset(["decode"])] if self.case.alone else []
        while True:
            before = len(self.works)
            for phases in turns or [self.batcher.phases]:
                self.batcher.phases = phases
                self._until_the_end(phases)
            if len(self.works) == before:
                return self

    def _until_the_end(self, phases: frozenset[Phase]) -> None:
        for _ in range(10_000):
            if (turn := self.batcher.turn()) is None:
                assert not self._line, "tokens are under way"
                return
            awaited, begins = turn
            assert not (self.case.one_stage and awaited)
            for work in awaited:
                assert self._line.popleft() == work, "tokens come in the order of their passes"
                self._deliver(work)
            for work in begins:
                assert work.phase in phases
                self._check(work)
                self.works.append(work)
                if work.choosing and self.case.one_stage:
                    self._deliver(work)
                elif work.choosing:
                    self._line.append(work)
        raise AssertionError("there is no end")

    def _arrivals(self, waits: bool) -> Sequence[int]:
        count = max(1, self._comes[0] if self._comes else 1) if waits else 0
        if self._comes and not waits:
            count = self._comes.popleft()
        now = [self._coming.popleft() for _ in range(min(count, len(self._coming)))]
        self._came.extend(now)
        return now

    def _ends(self, request: int, token: int) -> str | None:
        assert token == STEPS * request + len(self.tokens[request])
        return "stop" if token - STEPS * request + 1 == self.case.stops[request] else None

    def _deliver(self, work: Work) -> None:
        tokens = [STEPS * row.request + len(self.tokens[row.request]) for row in work.choosing]
        chosen = self.batcher.deliver(work, tokens)
        assert [(of.request, of.token) for of in chosen] == [
            (row.request, token) for row, token in zip(work.choosing, tokens, strict=True)
        ]
        for request, token, reason in chosen:
            assert request not in self.reasons, "it had ended"
            self.tokens[request].append(token)
            if reason is not None:
                self.reasons[request] = reason
                del self._living[self._slot_of[request]]

    def _check(self, work: Work) -> None:
        case = self.case
        assert work.number == case.first + len(self.works)
        assert work.rows
        slots = [row.slot for row in work.rows]
        assert slots == sorted(set(slots))
        (group,) = {self._group_of[slot] for slot in slots}
        entering = []
        for row in work.rows:
            assert row.request in self._came
            assert row.start == self._done[row.request], "each position once, and in order"
            if row.start == 0:
                assert row.slot not in self._living
                self._living[row.slot], self._slot_of[row.request] = row.request, row.slot
                entering.append(row.request)
            assert self._living[row.slot] == row.request
            prompt = case.prompts[row.request]
            if work.phase == "prefill":
                assert row.end == min(prompt, row.start + (case.chunk or prompt))
                assert row.chooses == (row.end == prompt)
            else:
                assert row.end == row.start + 1
                assert row.start == prompt + len(self.tokens[row.request]) - 1, "its last token is there"
                assert row.chooses
            self._done[row.request] = row.end
        if work.phase == "prefill":
            assert len(work.rows) <= (case.prefill_rows or case.num_slots)
        self._entered[group] += sorted(entering)
        assert self._entered[group] == sorted(self._entered[group]), "first come, first served"
        if case.prefill_rows is None:
            entered = sorted(request for of in self._entered.values() for request in of)
            assert entered == list(range(len(entered)))
        assert work.length == max(row.end - row.start for row in work.rows)


@settings(max_examples=800, deadline=None)
@given(cases())
@example(Case([1, 1], [2, 2], [None] * 2, num_slots=2, num_groups=1, comes=[1, 1], alone=True))
def test_every_request_gets_exactly_its_tokens(case: Case) -> None:
    run = Run(case).all()
    for request, (count, limit) in enumerate(zip(case.counts, case.limits, strict=True)):
        assert run.tokens[request] == list(range(STEPS * request, STEPS * request + count))
        stop = case.stops[request]
        assert run.reasons[request] == ("stop" if stop is not None and stop <= limit else "length")
        computed = [row.end - row.start for work in run.works for row in work.rows if row.request == request]
        assert sum(computed) == case.prompts[request] + count - 1


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_slot_is_empty_while_a_request_waits(case: Case) -> None:
    """A group alone, whose prompts take a pass each: after each turn all that can be worked on has been."""
    case.num_groups, case.chunk, case.prefill_rows, case.alone = 1, None, None, False
    case.comes, case.one_stage = [len(case.prompts)], False
    waiting, living = deque(case.counts), list[int]()  # tokens that each still gets
    expected: list[tuple[str, int]] = []
    while waiting or living:
        entering = [waiting.popleft() for _ in range(min(case.num_slots - len(living), len(waiting)))]
        expected += [(phase, len(rows)) for phase, rows in (("prefill", entering), ("decode", living)) if rows]
        living = [count - 1 for count in [*living, *entering] if count > 1]
    assert [(work.phase, len(work.rows)) for work in Run(case).all().works] == expected


def told(case: Case) -> list[tuple[Phase, list[tuple[int, ...]]]]:
    return [(work.phase, [tuple(row) for row in work.rows]) for work in Run(case).all().works]


def test_two_groups_of_one_slot() -> None:
    """Worked out by hand: the third enters where the first has ended, and has its first pass in that turn."""
    case = Case([3, 2, 1], [2, 3, 2], [None] * 3, num_slots=2, num_groups=2, comes=[3])
    assert told(case) == [
        ("prefill", [(0, 0, 0, 3, True)]),
        ("prefill", [(1, 1, 0, 2, True)]),
        ("decode", [(0, 0, 3, 4, True)]),
        ("decode", [(1, 1, 2, 3, True)]),
        ("prefill", [(0, 2, 0, 1, True)]),
        ("decode", [(1, 1, 3, 4, True)]),
        ("decode", [(0, 2, 1, 2, True)]),
    ]


def test_others_get_tokens_while_a_long_prompt_is_computed() -> None:
    """Of 5 tokens in chunks of 2."""
    case = Case([1, 5], [4, 2], [None] * 2, num_slots=2, num_groups=1, chunk=2, comes=[2])
    assert told(case) == [
        ("prefill", [(0, 0, 0, 1, True), (1, 1, 0, 2, False)]),
        ("prefill", [(1, 1, 2, 4, False)]),
        ("decode", [(0, 0, 1, 2, True)]),
        ("prefill", [(1, 1, 4, 5, True)]),
        ("decode", [(0, 0, 2, 3, True)]),
        ("decode", [(0, 0, 3, 4, True), (1, 1, 5, 6, True)]),
    ]


def test_one_stage_goes_on_from_a_prompt_at_once() -> None:
    """Its token is there when the pass ends, so that the same turn computes it."""
    case = Case([1, 5], [3, 2], [None] * 2, num_slots=2, num_groups=1, chunk=4, comes=[2], one_stage=True)
    assert told(case) == [
        ("prefill", [(0, 0, 0, 1, True), (1, 1, 0, 4, False)]),
        ("decode", [(0, 0, 1, 2, True)]),
        ("prefill", [(1, 1, 4, 5, True)]),
        ("decode", [(0, 0, 2, 3, True), (1, 1, 5, 6, True)]),
    ]


def test_tokens_of_prefill_alone_come_in_the_order_of_its_passes() -> None:
    """Groups begin in turn, and none awaits a token before all prompts have begun."""
    batcher = Batcher([1] * 4, [2] * 4, num_slots=4, num_groups=2, prefill_rows=1)
    batcher.phases = frozenset(["prefill"])
    batcher.offer(range(4))
    awaited: list[int] = []
    begun: list[int] = []
    while (turn := batcher.turn()) is not None:
        for work in turn[0]:
            assert len(begun) == 4
            awaited.append(work.number)
            batcher.deliver(work, [0])
        begun += [row.slot for work in turn[1] for row in work.rows]
    assert begun == [0, 2, 1, 3]
    assert awaited == [0, 1, 2, 3]


def test_only_who_has_nothing_to_do_waits_for_requests() -> None:
    """Asked before each turn; the second request has come when the first has ended, the third has not."""
    asked: list[bool] = []
    coming = [[], [0], [1], [], [], [2], [], [], []]

    def arrivals(waits: bool) -> list[int]:
        asked.append(waits)
        return coming.pop(0)

    batcher = Batcher([1] * 3, [1] * 3, num_slots=1, num_groups=1, arrivals=arrivals)
    finished: list[Chosen] = []
    while (turn := batcher.turn()) is not None:
        for work in turn[0]:
            finished += batcher.deliver(work, [7])
        list(turn[1])
    assert finished == [Chosen(request, 7, "length") for request in range(3)]
    assert asked == [False, True, False, False, False, True, False, False, True]


def test_without_requests_there_is_no_turn() -> None:
    for num_slots, num_groups in ((0, 0), (3, 2)):
        assert Batcher([], [], num_slots, num_groups).turn() is None


def test_passes_that_depend_on_nothing() -> None:
    works = [Work(number, "prefill", (Row(0, number, 0, 4, False),)) for number in range(3)]
    feed = Passes(works)
    assert feed.turn() == ([], works)
    assert feed.turn() is None
    with pytest.raises(AssertionError, match="chooses nothing"):
        feed.deliver(works[0], [1])


def test_a_token_too_few_is_an_error() -> None:
    batcher = Batcher([1, 1], [1, 1], num_slots=2, num_groups=1)
    batcher.offer([0, 1])
    _, begins = batcher.turn() or ([], iter(()))
    (work,) = begins
    with pytest.raises(ValueError, match="zip"):
        batcher.deliver(work, [1])


def test_a_sequence_without_a_token_ends_and_the_others_go_on() -> None:
    batcher = Batcher([2, 2], [3, 3], 2, 1)
    batcher.offer(range(2))
    turn = batcher.turn()
    assert turn is not None
    (work,) = turn[1]
    first, second = batcher.deliver(work, [-1, 7])
    assert (first.reason, second.reason) == (NO_NUMBERS, None)
    turn = batcher.turn()
    assert turn is not None
    assert [row.request for work in turn[1] for row in work.rows] == [1]
