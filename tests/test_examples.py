"""The examples of docs/add-*.md: a page shows its file of tests/examples/ as it stands, and that is all that it takes.

Here are the schedule and the engine; the others have their tests beside those of their tables.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from distributed import run_ranks
from examples import engine as engine_example
from examples.schedule import SCHEDULE
from helpers import make_config

from harness.corpus import prepare_corpus
from harness.errors import ConfigError
from harness.plan.simulate import simulate
from harness.record.columns import layout_columns
from harness.run.data import CorpusSamples, micro_batches
from harness.run.engines.engine import build_engine
from harness.spans.span import activity, measured_bubble
from harness.spec.config import REPOSITORY
from harness.spec.engines import ENGINES
from harness.spec.schedules import SCHEDULES, build_schedule, ideal_bubble_fraction

EXAMPLES = sorted((REPOSITORY / "tests" / "examples").glob("*.py"))
SMALL = ("data=synthetic", "model.num_hidden_layers=1", "model.hidden_size=64", "train.sequence_length=32")
SHOWN = re.compile(r"<!-- (tests/examples/\w+\.py) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_example_is_shown_as_it_is() -> None:
    pages = [page.read_text() for page in sorted((REPOSITORY / "docs").glob("add-*.md"))]
    shown = [match for page in pages for match in SHOWN.findall(page)]
    assert len(shown) == len(pages)
    assert dict(shown) == {f"tests/examples/{file.name}": without_docstring(file.read_text()) for file in EXAMPLES}


def without_docstring(code: str) -> str:
    """A module's code below its docstring, which the page replaces."""
    return re.sub(r'\A"""[^"]*"""\n\n', "", code)


def test_a_schedule_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(SCHEDULES, "one_by_one", SCHEDULE)
        config = make_config("parallel.schedule=one_by_one", "parallel.pp=2")
        assert layout_columns(config)["bubble_fraction_ideal"] == 0.5
        schedule = build_schedule("one_by_one", num_stages=4, num_micro_batches=8)
        assert schedule.most_in_flight == [1, 1, 1, 1]
        stages = simulate(schedule, {"forward": 0.01, "backward": 0.02})
        simulated = measured_bubble([[activity(spans)] for spans in stages])
        assert simulated.fraction == pytest.approx(ideal_bubble_fraction("one_by_one", 4, 8))
    with pytest.raises(ConfigError, match=r"parallel\.schedule=one_by_one is not available; use "):
        make_config("parallel.schedule=one_by_one", "parallel.pp=2", "train.seed=1")


def test_deepspeed_executes_a_schedule_that_was_added(tmp_path: Path) -> None:
    overrides = [*SMALL, "model.num_hidden_layers=2", "parallel.pp=2", "train.steps=3"]
    names = ("1f1b", "one_by_one", "gpipe", "zb_h1")  # which add up micro-batches in one order
    schedules = [[*overrides, f"parallel.schedule={name}"] for name in names]
    curve, *others = run_ranks(2, "ranks_examples", schedules, tmp_path)
    assert others == [curve] * len(others)


def test_an_engine_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "counting", engine_example.ENGINE)
        config = make_config("parallel.engine=counting", *SMALL)
        engine = build_engine(config, rank=0)
    corpus = prepare_corpus(config.data, config.model.vocab_size, config.train.sequence_length)
    data = micro_batches(config, CorpusSamples(config, corpus), dp_rank=0)
    losses = [engine.train_step(islice(data, config.num_micro_batches)) for _ in range(2)]
    assert all(5 < loss < 6 for loss in losses)  # log(256) is 5.5
    assert engine.num_tokens == 2 * config.train.global_batch_size * config.train.sequence_length
    assert engine.learning_rate() == config.train.learning_rate
    with pytest.raises(ConfigError, match=r"parallel\.engine=counting is not available; use one of "):
        make_config("parallel.engine=counting", *SMALL, "train.seed=1")
