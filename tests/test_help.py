"""`--help`: every launcher, every group and every key, at once; and every key means something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from helpers import compose_raw

from harness.spec import help
from harness.spec.config import REPOSITORY

LAUNCHERS = sorted(path.name for path in (REPOSITORY / "launchers").glob("*.py"))
HEAVY = {"torch", "pandas", "transformers", "deepspeed", "hydra", "wandb", "numpy"}

IMPORTED = f"""
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *({HEAVY} & set(sys.modules)))
"""


def ask(*command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, and what is printed on stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        help.answer_help(command)
    printed = capsys.readouterr()
    return int(str(ended.value.code)), printed.out, printed.err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_answers_without_what_takes_long_to_import(launcher: str) -> None:
    code = f"import sys; sys.argv = sys.argv[1:]\n{IMPORTED}"
    command = [sys.executable, "-c", code, str(REPOSITORY / "launchers" / launcher), "--help", "train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train.micro_batch_size=1\n" in done.stdout
    assert done.stdout.endswith("\nimported:\n")


def test_a_reader_may_stop_reading() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, REPOSITORY / "launchers" / "train.py", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_only_starts_a_run_imports_no_numbers() -> None:
    code = f"import sys, harness.launch.train\nprint(*({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.split()} <= {"hydra"}


def test_the_answer_names_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for launcher in LAUNCHERS:
        status, text, _ = ask(f"launchers/{launcher}", "model=llama_tiny", "--help", capsys=capsys)
        assert status == 0
        assert f"Usage: {help.launchers()[launcher][1]}\n" in text
        assert ("\n  --wandb          write the runs" in text) == (launcher == "report.py")
        for name in [*LAUNCHERS, "quickstart.sh", "test.sh", *help.groups()]:
            assert f"\n  {name} " in text
        assert "setup.sh" not in text  # others source it
        assert "gpt2_tiny, bert" in text  # the default first
        assert "results_dir=null" in text


@pytest.mark.parametrize("topic", ["all", *help.groups()])
def test_a_group_tells_its_keys(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = ask("launchers/train.py", "-h", topic, capsys=capsys)
    shown = [line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    expected = [key.name for key in help.all_keys() if topic in ("all", key.name.partition(".")[0])]
    assert status == 0
    assert [name for name in shown if name != topic] == expected


def test_a_key_tells_its_values_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = ask("sweep.py", "--help", "tracking.wandb", "model.jitter", capsys=capsys)
    assert ask("sweep.py", "--help", "tracking.wandb", "model.jitter", "--cfg", "job", capsys=capsys)[1] == text
    assert "  tracking.wandb.mode=offline  (offline, online, disabled)\n      offline: files" in text
    assert "  model.jitter=0.0\n      With model=emulated: Each wait is longer" in text


@pytest.mark.parametrize(
    ("topic", "sentence"),
    [
        ("trian", "trian is no group and no key; did you mean train or tracking?"),
        ("steps", "steps is no group and no key; did you mean train.steps?"),
        ("train.stepz", "train.stepz is no group and no key; did you mean train.steps"),
        ("xxxxxxx", "xxxxxxx is no group and no key; groups are model, parallel, train"),
    ],
)
def test_an_unknown_name_is_told_what_is_near(topic: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ask("train.py", "--help", topic, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")


def test_nobody_is_helped_who_does_not_ask() -> None:
    help.answer_help(["train.py", "--cfg", "job", "train.steps=3"])
    help.answer_help(["train.py", "--hydra-help"])


def test_defaults_are_those_that_hydra_composes() -> None:
    composed = compose_raw()
    for key in help.all_keys():
        if key.meaning.startswith("With "):
            continue
        value = composed
        for name in key.name.split("."):  # a key that came later may have its default in the schema only
            value = value.get(name, yaml.safe_load(key.default)) if isinstance(value, dict) else value
        assert key.default == value or yaml.safe_load(key.default) == value or float(key.default) == value, key


def test_every_key_and_every_section_has_a_meaning() -> None:
    assert [key.name for key in help.all_keys() if not key.meaning] == []
    assert [group for group in help.groups() if not help._meaning_of(group)] == ["experiment"]
