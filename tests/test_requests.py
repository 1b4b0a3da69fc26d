"""Requests come when they are said to, their moments are kept, and what is written and sent of them is whole."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_config
from hypothesis import given
from hypothesis import strategies as st

from harness.prompts import Prompt, load_tokenizer, random_prompt, read_prompts
from harness.record.inference import PhaseRecord
from harness.record.store import Attempt
from harness.run.inference import requests
from harness.run.inference.messages import decode, encode
from harness.run.inference.requests import Journal, Requests, arrival_seconds
from harness.run.inference.texts import Texts
from harness.spec.batching import Chosen, Row, Work
from harness.spec.config import REPOSITORY, Generate

BYTES = load_tokenizer("bytes", "")


class Clock:
    """Time that passes only while somebody sleeps, or is let pass."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(requests, "time", made)
    return made


# --- when requests come


def test_without_a_rate_all_come_at_once() -> None:
    assert arrival_seconds(Generate(), 4) == [0.0] * 4
    assert arrival_seconds(Generate(request_rate=2.0), 0) == []


@pytest.mark.parametrize("rate", [0.25, 40.0])
def test_requests_are_a_poisson_process(rate: float) -> None:
    """Gaps have the mean, the spread and the quantiles of an exponential distribution, and know nothing of the last."""
    count = 20_000
    moments = np.array(arrival_seconds(Generate(request_rate=rate), count))
    gaps = np.diff(moments, prepend=0.0) * rate
    assert (gaps > 0).all()
    assert abs(gaps.mean() - 1) < 4 / math.sqrt(count)
    assert abs(gaps.std() - 1) < 4 * math.sqrt(2 / count)
    for quantile in (0.1, 0.5, 0.9):
        share = (gaps < -math.log(1 - quantile)).mean()
        assert abs(share - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / count)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(count)


def test_a_seed_is_a_list_of_moments() -> None:
    settings = Generate(request_rate=3.0, seed=7)
    moments = arrival_seconds(settings, 50)
    assert moments == arrival_seconds(settings, 50)
    assert moments[:20] == arrival_seconds(settings, 20)
    assert moments != arrival_seconds(Generate(request_rate=3.0, seed=8), 50)
    assert arrival_seconds(Generate(request_rate=6.0, seed=7), 50) == pytest.approx([of / 2 for of in moments])


# --- the journal


def test_requests_are_told_once_they_have_come(clock: Clock) -> None:
    idle: list[float] = []
    journal = Journal([0.0, 0.0, 2.0, 2.5, 6.0], lambda: idle.append(clock.now - 1000))
    clock.now = 1000.0
    assert journal.arrive(False) == [0, 1]
    assert journal.arrive(False) == []
    clock.now += 2.25
    assert journal.arrive(True) == [2], "there is one already"
    assert not clock.slept
    clock.now += 0.25
    assert journal.arrive(False) == [3]
    assert journal.arrive(True) == [4]
    assert journal.now == 6.0
    assert clock.slept == [1.0, 1.0, 1.0, 0.5], "and told that it lives in between"
    assert idle == [2.5, 3.5, 4.5, 5.5]
    assert journal.arrive(True) == journal.arrive(False) == []
    assert journal.age(3) == 3.5


def test_time_begins_with_the_first_question(clock: Clock) -> None:
    journal = Journal([1.0])
    clock.now += 500
    assert journal.arrive(False) == []
    assert journal.arrive(True) == [0]
    assert clock.slept == [1.0]


def filled(clock: Clock) -> Journal:
    """Of two requests, at 0 and 1 s, with tokens at 2, 5, 9 and at 5 s."""
    journal = Journal([0.0, 1.0])
    assert journal.arrive(False) == [0]
    clock.now = 1001.5
    first, second = Row(0, 0, 0, 3, True), Row(1, 1, 0, 3, True)
    journal.began(Work(0, "prefill", (first,)))
    clock.now = 1002.0
    journal.told([Chosen(0, 7, None)])
    clock.now = 1003.0
    journal.began(Work(1, "decode", (first, second)))
    clock.now = 1005.0
    journal.told([Chosen(0, 7, None), Chosen(1, 7, "stop")])
    clock.now = 1009.0
    journal.told([Chosen(0, 7, "length")])
    clock.now = 1020.0
    return journal


def test_moments_make_the_record(clock: Clock) -> None:
    record = filled(clock).record(3, 100, None, None)
    assert (record.number, record.peak_memory_bytes, record.tokens) == (3, 100, 4)
    assert record.seconds == 9.0
    assert record.first_token_seconds == [2.0, 4.0]
    assert record.inter_token_seconds == [3.0, 4.0]
    assert record.queue_seconds == [1.5, 2.0]


def test_the_time_between_two_phases_is_no_sequences(clock: Clock) -> None:
    prefill, decode = PhaseRecord(2.5, 6, None), PhaseRecord(4.5, 2, None)
    record = filled(clock).record(1, 0, prefill, decode)
    assert record.seconds == 7.0
    assert record.inter_token_seconds == [4.0]
    assert (record.prefill, record.decode) == (prefill, decode)
    assert filled(clock).record(1, 0, prefill, None).seconds == 2.5


# --- what is asked for


def test_only_some_prompts_are_generated_from() -> None:
    asked = Requests([Prompt("a", [1]), Prompt("", [], "it is empty"), Prompt(None, [2, 3])], [9])
    assert asked.numbers == [0, 2]
    assert asked.tokens == [[1], [2, 3]]


def test_random_prompts_are_as_many_as_are_asked_for() -> None:
    config = make_config("task=generate")
    for settings, count in ((Generate(prompt_length=5), 8), (Generate(prompt_length=5, num_requests=3), 3)):
        prompts = read_prompts(settings, config.model, BYTES)
        assert Requests(prompts, []).tokens == [random_prompt(settings, config.model, n) for n in range(count)]


# --- what is written


def written(attempt: Attempt) -> list[dict[str, Any]]:
    return [json.loads(line) for line in attempt.generated_file.read_text().splitlines()]


def texts_of(folder: Path, prompts: list[Prompt], stop_tokens: list[int], **settings: Any) -> tuple[Texts, Attempt]:
    attempt = Attempt(folder / "attempt-1")
    attempt.path.mkdir(exist_ok=True)
    return Texts(attempt, Generate(**settings), Requests(prompts, stop_tokens), BYTES), attempt


def say(texts: Texts, request: int, text: str | list[int], last: str | None = None) -> str | None:
    """Tokens of a request come one by one; why it ended."""
    for token in text.encode() if isinstance(text, str) else text:
        reason = texts.ends(request, token)
        texts.told([Chosen(request, token, reason)], lambda request: request + 0.5)
        if reason is not None:
            return reason
    if last is not None:
        texts.told([Chosen(request, token, last)], lambda request: request + 0.5)
    return last


def test_a_line_for_each_prompt_in_the_order_they_end(tmp_path: Path) -> None:
    """One of no use is told first; the numbers are those of the prompts that were given."""
    prompts = [Prompt("ab", [97, 98]), Prompt("", [], "it is empty"), Prompt(None, [99]), Prompt("d", [100])]
    texts, attempt = texts_of(tmp_path, prompts, [0])
    assert written(attempt) == [
        {
            "prompt": "", "prompt_tokens": [], "tokens": [], "text": "", "finish_reason": "error: it is empty",
            "seconds": 0.0, "number": 1,
        }
    ]  # fmt: skip
    say(texts, 0, "no")
    assert len(written(attempt)) == 1
    assert say(texts, 2, "x", "length") == "length"
    assert say(texts, 0, [0]) == "stop"
    assert say(texts, 1, "é", "length") == "length"
    texts.close()
    assert [line["number"] for line in written(attempt)] == [1, 3, 0, 2]
    assert [line["text"] for line in written(attempt)] == ["", "x", "no", "é"]
    assert [line["tokens"] for line in written(attempt)] == [[], [120], [110, 111, 0], [195, 169]]
    assert [line["finish_reason"] for line in written(attempt)[1:]] == ["length", "stop", "length"]
    assert [line["seconds"] for line in written(attempt)[1:]] == [2.5, 0.5, 1.5]
    assert [line["prompt"] for line in written(attempt)[1:]] == ["d", "ab", None]
    assert [line["prompt_tokens"] for line in written(attempt)[1:]] == [[100], [97, 98], [99]]
    assert not attempt.stream_file.exists(), "of several texts none is shown"


@pytest.mark.parametrize(("ignores", "expected"), [(False, ("one ", "stop")), (True, ("one END.", "length"))])
def test_a_stop_string_ends_a_text_before_it(tmp_path: Path, ignores: bool, expected: tuple[str, str]) -> None:
    texts, attempt = texts_of(tmp_path, [Prompt("a", [97])], [], stop_strings=["END"], ignore_stop=ignores)
    reason = say(texts, 0, "one END.", "length")
    texts.close()
    (line,) = written(attempt)
    assert (line["text"], reason) == (line["text"], line["finish_reason"]) == expected
    assert attempt.stream_file.read_text() == expected[0]
    assert line["tokens"] == list(b"one END." if ignores else b"one END")


def test_the_only_text_is_shown_as_it_comes(tmp_path: Path) -> None:
    """What may be the begin of a stop string, or of a character, is shown when it is known."""
    texts, attempt = texts_of(tmp_path, [Prompt("a", [97])], [0], stop_strings=["END"])
    shown = []
    for token in [*"aéEN".encode(), 0]:
        say(texts, 0, [token])
        shown.append(attempt.stream_file.read_text())
    assert shown == ["a", "a", "aé", "aé", "aé", "aéEN"], "a stop token has no text, and what was held is no stop"
    assert written(attempt)[0]["text"] == "aéEN"


def test_what_a_prompt_of_no_use_leaves(tmp_path: Path) -> None:
    texts, attempt = texts_of(tmp_path, [Prompt("", [], "it is empty")], [])
    texts.close()
    assert written(attempt)[0]["finish_reason"] == "error: it is empty"
    assert attempt.stream_file.read_text() == ""


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    """Of all sequences that had ended, also long ones."""
    program = f"""
import os, signal
from pathlib import Path
from test_requests import *
texts, _ = texts_of(Path({str(tmp_path)!r}), [Prompt("a", [97])] * 3, [0])
say(texts, 0, "x" * 20_000, "length")
say(texts, 2, "y", "length")
say(texts, 1, "z")
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    ran = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, cwd=REPOSITORY, check=False)
    assert ran.returncode == -signal.SIGKILL
    content = Attempt(tmp_path / "attempt-1").generated_file.read_text()
    assert content.endswith("\n")
    assert [json.loads(line)["text"] for line in content.splitlines()] == ["x" * 20_000, "y"]


# --- what stages tell each other

ROWS = st.builds(Row, *[st.integers(0, 2**40)] * 4, st.booleans())


@given(
    st.integers(0, 2**40), st.sampled_from(["prefill", "decode"]), st.lists(ROWS, min_size=1, max_size=6),
    st.integers(0, 3), st.data(),
)  # fmt: skip
def test_passes_arrive_as_they_were(number: int, phase: Any, rows: list[Row], room: int, data: Any) -> None:
    work = Work(number, phase, tuple(rows))
    tokens = data.draw(st.just([]) | st.lists(st.integers(0, 2**40), min_size=len(rows), max_size=len(rows)))
    coded = encode(work, tokens, len(rows) + room)
    assert coded.shape == encode(None, [], len(rows) + room).shape, "all messages have one length"
    heard = decode(coded)
    assert heard == (work, tokens or [0] * len(rows))
    assert [type(row.chooses) for row in heard[0].rows] == [bool] * len(rows)


def test_the_end_is_no_pass() -> None:
    assert decode(encode(None, [], 3)) is None
    assert encode(None, [], 3).dtype == torch.int64


def test_a_pass_needs_a_token_for_each_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        encode(Work(0, "decode", (Row(0, 0, 1, 2, True), Row(1, 1, 1, 2, True))), [5], 2)
