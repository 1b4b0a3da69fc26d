"""launchers/generate.py and sweeps of inference as people run them: what is said, written, kept and refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml  # type: ignore[import-untyped]
from helpers import MACHINE, compose_raw, make_config, read_offline_run
from helpers_pretrained import save_reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.launch import generate, train, verify
from harness.launch.attempts import _Watch
from harness.launch.backends.local import marked
from harness.launch.generate import _show, write_output
from harness.launch.points import Run, new_attempt
from harness.prompts import load_tokenizer, read_prompts
from harness.record.heartbeat import Heart
from harness.record.store import Attempt, Point, SweepDirectory, read_jsonl
from harness.run.inference.generation import Generation
from harness.run.inference.requests import Journal, Requests
from harness.run.inference.texts import Texts
from harness.spec.config import REPOSITORY, RunConfig

LAUNCHERS = REPOSITORY / "launchers"
QUIET = ["tracking.wandb.mode=disabled", "launch.threads_per_rank=1"]
TINY = ["model=gpt2_tiny", "model.max_position_embeddings=64", "train.precision=fp32"]
WAITS = ["model=emulated", "model.num_hidden_layers=2", "parallel.pp=2", "generate.temperature=1.0"]
"""Two stages that wait instead of computing, and draw from all tokens nearly alike."""
SOONEST = "prompt prompt_tokens tokens text finish_reason seconds".split()
"""Keys that a line begins with."""


def start(folder: Path, launcher: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A launcher in a folder; shells would make one in the background ignore Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, str(LAUNCHERS / launcher), *arguments, f"results_dir={folder / 'res'}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(folder: Path, launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, launcher, *arguments)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()  # its guard ends the ranks
    return subprocess.CompletedProcess(arguments, process.returncode, output.decode(), errors.decode())


def the_attempt(folder: Path) -> Attempt:
    (path,) = folder.glob("res/generated/points/*/attempt-1")
    return Attempt(path)


def wait_until(holds: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


# --- prompts of a file

LONGEST = 63
GIVEN: list[dict[str, Any]] = [
    {"prompt": "Call me Ishmael."},
    {"prompt": ""},
    {"prompt_tokens": [97, 98, 99], "note": "mine"},
    {"prompt_tokens": [97] * (LONGEST + 1)},
    {"prompt": "é, said 'x'"},
    {"prompt_tokens": [3, 256]},
    {"prompt_tokens": [97] * LONGEST},
    {"prompt": "It"},
]
PROBLEMS = {1: "the prompt is empty", 3: "the prompt has 64 tokens", 5: "the prompt has the token 256"}
VOWELS = ["a", "e", "i", "o", "u", "y", "th", "1", "2", "3", "4", "5", "6"]


@contextmanager
def alone() -> Iterator[None]:
    """This process is all ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(before)


def lines_of_one_rank(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """What the configuration generates without a pipeline, one sequence after the other."""
    parallel = config.parallel.model_copy(update={"pp": 1})
    settings = config.generate.model_copy(update={"batch_size": 1, "num_groups": None})
    config = config.model_copy(update={"parallel": parallel, "generate": settings})
    attempt, tokenizer = Attempt(folder / "attempt-1"), load_tokenizer("bytes", "")
    attempt.spans_file(0).parent.mkdir(parents=True)
    prompts = read_prompts(settings, config.model, tokenizer)
    requests = Requests(prompts, [])
    with alone():
        generation = Generation(attempt, config, 0, requests, MACHINE, Heart(attempt.path, 0))
        texts = Texts(attempt, settings, requests, tokenizer)
        generation.run(texts)
        texts.close()
        generation.meter.close()
    return sorted(read_jsonl(attempt.generated_file), key=lambda line: line["number"])


def test_prompts_of_a_file_become_lines_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in GIVEN))
    sampled = ["generate.max_new_tokens=12", "generate.temperature=1.0", f"generate.stop_strings={VOWELS}"]
    files = ["generate.prompts_file=given.jsonl", "generate.output=out.jsonl", "generate.batch_size=3"]
    done = run(tmp_path, "generate.py", *TINY, "parallel.pp=2", "launch.threads_per_rank=1", *sampled, *files)
    assert done.returncode == 0, done.stdout + done.stderr

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [origin.get("prompt") for origin in GIVEN]
    assert all([*line][: len(SOONEST)] == SOONEST for line in lines)
    for number, (line, origin) in enumerate(zip(lines, GIVEN, strict=True)):
        tokens = origin.get("prompt_tokens", [*origin.get("prompt", "").encode()])
        assert line["prompt_tokens"] == tokens
        if number in PROBLEMS:
            assert line["finish_reason"].startswith(f"error: {PROBLEMS[number]}")
            assert (line["tokens"], line["text"], line["seconds"]) == ([], "", 0)
            continue
        raw, text = bytes(line["tokens"]).decode(errors="replace"), line["text"]
        stops = [stop for stop in VOWELS if stop in raw]
        assert line["seconds"] > 0
        assert line["finish_reason"] == ("stop" if stops else "length"), line
        assert not stops or min(raw.index(stop) for stop in stops) == len(text)
        assert raw.startswith(text)
        assert stops or len(line["tokens"]) == min(12, LONGEST + 1 - len(tokens))
        assert f"[{number + 1}] {line['prompt'] or tokens}\n{text}\n\n" in done.stdout
    assert {line["finish_reason"] for line in lines} >= {"stop", "length"}

    attempt = the_attempt(tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = lines_of_one_rank(tmp_path / "alone", attempt.config())
    assert [line | {"seconds": 0} for line in lines] == [line | {"seconds": 0} for line in expected]
    assert attempt.status()["status"] == "ok"
    assert done.stdout.count("\n[") + 1 == len(GIVEN)
    assert f"run: {attempt.path}" in done.stderr
    assert "tokens/s generated" in done.stderr
    assert "tokens/s" not in done.stdout
    (mirrored,) = tmp_path.glob("res/generated/wandb/offline-run-*/run-*.wandb")
    mirror = read_offline_run(mirrored)
    assert mirror.exit_code == 0
    assert mirror.config["task"] == "generate"
    assert mirror.summary["tokens_per_second"] > 0


# --- a prompt

PROMPT = "- 'It's', she said: a=b, {c} ${x} \\${y}\n\"né\" \U0001f600 [1] \\"


QUOTES = {
    "'a, b'": "a, b",
    '"it\'s"': "it's",
    "'it\\'s'": "it's",
    "'a' and 'b'": "'a' and 'b'",
    '"a" and "b"': '"a" and "b"',
    "'": "'",
    "null": None,
}


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(st.sampled_from("ab'\"\\${}[](), =-\n\té:#~")))
@example(prompt=PROMPT)
@example(prompt="--help")
@example(prompt="")
@example(prompt="\\\n")
def test_any_text_is_a_prompt(prompt: str) -> None:
    """As it is typed, and again as command.txt repeats it; a text that is quoted as a whole is what is within."""
    once = generate.quoted(f"generate.prompt={prompt}")
    assert generate.quoted(once) == once
    if not re.fullmatch(generate.QUOTED, prompt, re.DOTALL):
        assert compose_raw("task=generate", once)["generate"]["prompt"] == prompt


def test_quotes_around_a_prompt_and_no_prompt() -> None:
    for typed, prompt in QUOTES.items():
        assert compose_raw(generate.quoted(f"generate.prompt={typed}"))["generate"]["prompt"] == prompt
    assert generate.quoted("generate.seed=3") == "generate.seed=3"


@pytest.mark.slow
def test_text_is_shown_as_it_comes(tmp_path: Path) -> None:
    """About a token in 0.1 s; figures are no part of it."""
    timed = [*WAITS, "model.forward_seconds=0.05", "generate.max_new_tokens=30", *QUIET]
    process = start(tmp_path, "generate.py", *timed, f"generate.prompt={PROMPT}")
    assert process.stdout is not None
    assert process.stderr is not None
    pieces = []
    while piece := os.read(process.stdout.fileno(), 2**16):
        pieces.append((time.monotonic(), piece))
    errors = process.stderr.read().decode()
    assert process.wait(60) == 0, errors
    attempt = the_attempt(tmp_path)
    (line,) = read_jsonl(attempt.generated_file)
    assert (line["prompt"], len(line["tokens"])) == (PROMPT, 30)
    assert b"".join(piece for _, piece in pieces).decode() == f"{PROMPT}{line['text']}\n"
    assert attempt.stream_file.read_bytes().decode() == line["text"]
    assert len(pieces) > 5
    assert pieces[-1][0] - pieces[1][0] > 1.0, "it came at once"
    assert "tokens/s generated" in errors
    command = shlex.split(attempt.command())
    assert command[:2] == ["python", "launchers/generate.py"]
    assert compose_raw(*command[2:])["generate"]["prompt"] == PROMPT


# --- ends that nobody wanted


def kill_a_rank(attempt: Attempt, launcher: subprocess.Popen[bytes]) -> None:
    next(process for process in marked(attempt.path) if process.environ().get("RANK") == "1").kill()


def press_ctrl_c(attempt: Attempt, launcher: subprocess.Popen[bytes]) -> None:
    launcher.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strike", "status", "reason"),
    [
        (kill_a_rank, "crashed", r"rank 1 (was ended by SIGKILL|ended without a word)"),
        (press_ctrl_c, "interrupted", "stopped by SIGINT before it finished"),
    ],
)
def test_sequences_that_have_ended_are_kept(
    strike: Callable[[Attempt, subprocess.Popen[bytes]], None], status: str, reason: str, tmp_path: Path
) -> None:
    """Of eight sequences, two at a time."""
    (tmp_path / "given.txt").write_text("".join(f"{number}\n" for number in range(8)))
    timed = [*WAITS, "model.forward_seconds=0.1", "generate.max_new_tokens=5", "generate.batch_size=2"]
    files = ["generate.prompts_file=given.txt", "generate.output=out.jsonl"]
    process = start(tmp_path, "generate.py", *timed, *files, *QUIET)
    try:
        wait_until(lambda: [*tmp_path.glob("res/generated/points/*/attempt-1/status.json")], process)
        attempt = the_attempt(tmp_path)
        wait_until(lambda: len(read_jsonl(attempt.generated_file)) >= 2, process)
        strike(attempt, process)
        output, errors = (stream.decode() for stream in process.communicate(timeout=60))
    finally:
        process.kill()
    assert process.returncode == 1, output + errors
    assert marked(tmp_path) == set()
    left = attempt.status()
    assert left["status"] == status
    assert re.match(reason, str(left["reason"]))
    assert f"{status}: {left['reason']}\n" in errors
    assert "Traceback" not in errors
    ended = sorted(read_jsonl(attempt.generated_file), key=lambda line: line["number"])
    content = (tmp_path / "out.jsonl").read_text()
    assert content.endswith("\n")
    assert [json.loads(line) for line in content.splitlines()] == ended
    assert 2 <= len(ended) < 8
    assert all((line["finish_reason"], len(line["tokens"])) == ("length", 5) for line in ended)
    assert all(f"[{line['number'] + 1}] {line['prompt']}\n" in output for line in ended)
    assert output.count("\n[") + 1 == len(ended)


def test_waiting_for_requests_is_no_hang(tmp_path: Path) -> None:
    """Two requests, 3.5 s apart."""
    attempt = Attempt(tmp_path)
    journal = Journal([0.0, 3.5], idle=lambda: heart.phase("waiting for requests"))
    heart = Heart(tmp_path, 0)
    watch, idle = _Watch(attempt, 1), []
    requests = threading.Thread(target=lambda: [journal.arrive(waits=True) for _ in range(2)])
    requests.start()
    while requests.is_alive():
        idle.append(watch.idle_seconds())
        time.sleep(0.05)
    assert len(idle) > 30
    assert max(idle) < 2.5
    assert watch.heartbeats[0].what == "waiting for requests"


# --- what is refused


BYTES = os.fsdecode(b"caf\xe9")
REFUSED: list[tuple[list[str], list[str]]] = [
    (["generate.prompt=" + "x" * 3000], ["generate.prompt='xxx", "has 3000 tokens", "has room for 1023", "shorten it"]),
    (["generate.prompt="], ["generate.prompt=''", "the prompt is empty; give it a text"]),
    ([f"generate.prompt={BYTES}"], ["generate.prompt=", "is not UTF-8; set the terminal to UTF-8"]),
    (["generate.prompts_file=bytes"], ["generate.prompts_file='bytes' is not UTF-8 text (byte 3)", "save it as UTF-8"]),
    (["generate.prompts_file=no.txt"], ["generate.prompts_file='no.txt' can't be read", "give a file"]),
    (["generate.prompts_file=empty"], ["generate.prompts_file='empty' is empty; give"]),
    (
        ["generate.prompt=a", "generate.prompts_file=bytes"],
        ["generate.prompt='a'", "'bytes' are both given; leave one"],
    ),
    (
        ["generate.prompt=a", "generate.output=no/out.jsonl"],
        ["generate.output='no/out.jsonl'", "no folder no; make it"],
    ),
    (["generate.output=out.jsonl"], ["generate.output='out.jsonl'", "give generate.prompt or generate.prompts_file"]),
    (["generate.prompt=a", "generate.temperature=-1"], ["generate.temperature=-1", "greater than or equal to 0"]),
    (["generate.prompt=a", "generate.temperature=nan"], ["generate.temperature=nan", "a finite number"]),
    (["generate.prompt=a", "generate.top_p=0"], ["generate.top_p=0", "greater than 0"]),
    (["generate.prompt=a", "generate.top_p=1.5"], ["generate.top_p=1.5", "less than or equal to 1"]),
    (["generate.prompt=a", "generate.top_k=-1"], ["generate.top_k=-1", "greater than or equal to 0"]),
    (["generate.prompt=a", "generate.repetition_penalty=0"], ["generate.repetition_penalty=0", "greater than 0"]),
    (["generate.prompt=a", "generate.max_new_tokens=0"], ["generate.max_new_tokens=0", "greater than or equal to 1"]),
    (["generate.num_groups=9"], ["generate.num_groups=9 exceeds generate.batch_size=8; use 8 or less"]),
    (["generate.request_rate=0"], ["generate.request_rate=0", "greater than 0"]),
    (["generate.prompt=a", "-m"], ["this launcher runs one layout; use launchers/sweep.py"]),
]


WEIGHTS = {"cut": "is damaged", "another": "use the config.json that belongs to the weights", "none": "does not exist"}


def refusal(folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What generate.py says of arguments, which shall be refused at once and leave nothing."""
    before, began = sorted(folder.iterdir()), time.monotonic()
    assert generate.main(arguments) == 2
    assert time.monotonic() - began < 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 500
    assert sorted(folder.iterdir()) == before
    return said.err


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=lambda value: value[-1][:40])
def test_what_can_not_be_is_one_sentence(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"ab\n\xff\n")
    (tmp_path / "empty").touch()
    said = refusal(tmp_path, ["model=gpt2_tiny", "results_dir=res", *arguments], capsys)
    assert [part for part in parts if part not in said] == [], said


def test_weights_that_can_not_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off, of another shape than their configuration, and none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("cut", "another"):
        save_reference(tmp_path / name, "gpt2")
    capsys.readouterr()  # its progress
    file, shape = tmp_path / "cut" / "model.safetensors", tmp_path / "another" / "config.json"
    file.write_bytes(file.read_bytes()[:-100])
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"n_positions": 7}))
    for name, sentence in WEIGHTS.items():
        said = refusal(tmp_path, ["results_dir=res", f"model.weights={name}", "generate.prompt=a"], capsys)
        assert sentence in said, said
        assert name in said


SHOWN = ["generate.prompt=- a, b", "generate.seed=3"]


def test_a_refusal_is_an_exit_status(tmp_path: Path) -> None:
    """Of a prompt that no Python text can be sent as, and of flags that Hydra answers."""
    done = run(tmp_path, "generate.py", f"generate.prompt={BYTES}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: generate.prompt='caf\\udce9' is not UTF-8")
    helped, shown = run(tmp_path, "generate.py", "--help"), run(tmp_path, "generate.py", "--cfg", "job", *SHOWN)
    assert (helped.returncode, shown.returncode) == (0, 0), shown.stderr
    assert "launchers/generate.py" in helped.stdout
    assert helped.stderr + shown.stderr == ""
    assert yaml.safe_load(shown.stdout)["generate"]["prompt"] == "- a, b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--cfg", "job"], [*SHOWN, "--cfg", "job"], ["--cfg", "job", *SHOWN]])
def test_flags_of_hydra_stand_anywhere(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main(arguments) == 0
    assert yaml.safe_load(capsys.readouterr().out)["task"] == "generate"


@pytest.mark.parametrize("world_size", [None, 1])
def test_only_generate_py_writes_the_output(
    world_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    request = ["task=generate", "generate.prompt=a", "generate.output=out.jsonl", "results_dir=res"]
    sentence = "generate.output='out.jsonl' is written by launchers/generate.py alone; start that"
    if world_size is None:
        assert train.main(request) == 2
        assert sentence in capsys.readouterr().err
    else:
        with pytest.raises(train.ConfigError, match=re.escape(sentence)):
            train.prepare(request, world_size)
    assert list(tmp_path.iterdir()) == []


def test_the_parity_check_of_a_generation_has_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.attempts, "run_attempt", lambda *_, **__: None)
    config, overrides = make_config("task=generate", "parallel.pp=2"), ["task=generate", "parallel.pp=2"]
    measured = new_attempt(config, SweepDirectory(tmp_path, "sweep"), "0123", overrides)
    check = verify._checked(Point(tmp_path / "parity"), Run(config, measured, reused=False), MACHINE, {})
    assert measured.command() == "python launchers/generate.py task=generate parallel.pp=2"
    assert check.command() == "python launchers/verify.py task=generate parallel.pp=2"


def write_lines(tmp_path: Path) -> Attempt:
    attempt = Attempt(tmp_path)
    lines = [{"prompt": "b", "number": 1}, {"prompt": "a", "number": 0}]
    attempt.generated_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return attempt


def test_the_output_goes_where_a_link_leads_and_into_devices(tmp_path: Path) -> None:
    attempt = write_lines(tmp_path)
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert write_output(attempt, tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [json.loads(line)["prompt"] for line in (tmp_path / "real.jsonl").read_text().splitlines()] == ["a", "b"]
    assert write_output(attempt, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_an_output_that_can_not_be_written_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = write_lines(tmp_path)
    assert not write_output(attempt, Path("/dev/full"))
    assert not write_output(attempt, tmp_path / "nowhere" / "a.jsonl")
    said = capsys.readouterr().err.splitlines()
    assert [str(attempt.generated_file) in line for line in said] == [True, True]


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_terminal, shown in ((False, "a\x1b[2J\n\tb"), (True, "a\N{REPLACEMENT CHARACTER}[2J\n\tb")):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        _show("a\x1b[2J\n\tb")
        assert capsys.readouterr().out == shown
