"""launchers/generate.py: text from prompts, or a measurement of one layout, started by `python`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from harness.analyse.finish import finish_now, follow
from harness.launch import attempts
from harness.launch.single import run_single
from harness.machine import Machine
from harness.record.diagnose import exit_status
from harness.record.store import Attempt, read_jsonl, write_atomically
from harness.record.summary import inference_lines, perplexity_lines
from harness.spec.config import RunConfig
from harness.spec.generation import gives_prompts
from harness.strict_json import dumps

GENERATED = "generated"
"""Folder of generations under results_dir."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
QUOTED = r"""(['"])(?:\\.|(?!\1)[^\\])*\1"""
"""One text in quotes, and nothing beside it."""


def main(argv: Sequence[str]) -> int:
    """Generate, or measure where no prompt is given; the exit status."""
    overrides = [number for number, argument in enumerate(argv) if "=" in argument and not argument.startswith("-")]
    own = [] if any(argv[number].lstrip("+").startswith("task=") for number in overrides) else ["task=generate"]
    first = overrides[0] if overrides else len(argv)  # Hydra's flags come before all overrides, or behind
    return run_single([*argv[:first], *own, *map(quoted, argv[first:])], GENERATED, generate)


def quoted(argument: str) -> str:
    """An override as Hydra reads it: a prompt may hold anything, and need not be quoted once more for it."""
    key, _, value = argument.partition("=")
    if key != "generate.prompt" or value == "null" or re.fullmatch(QUOTED, value, re.DOTALL):
        return argument
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"


def generate(attempt: Attempt, config: RunConfig, machine: Machine) -> int:
    """Run an attempt, show its text as it comes, and write what was asked for; the exit status."""
    writes = gives_prompts(config) and config.task == "generate"
    if not writes:
        print(f"{config.model.name} {config.slug}: {attempt.path}", flush=True)
    following = follow(attempt, config)
    shown = (Story(attempt) if config.generate.prompt is not None else Sequences(attempt)) if writes else True
    outcome, is_written = attempts.run_attempt(attempt, config, machine, echo=shown), True
    if writes:
        print(flush=True)
        if config.generate.output is not None:
            is_written = write_output(attempt, Path(config.generate.output))
        result = attempt.result()
        if result is not None and "row" in result:
            lines = [*inference_lines(config, result["row"]), *perplexity_lines(config, result)]
            print("\n".join(["", *lines, f"run: {attempt.path}"]), file=sys.stderr)
    finish_now(attempt, following)
    return max(exit_status(attempt, outcome), int(not is_written))


def write_output(attempt: Attempt, file: Path) -> bool:
    """Write the lines of all sequences that have ended, in the order of their prompts; whether that was possible."""
    lines = sorted(read_jsonl(attempt.generated_file), key=lambda line: int(line["number"]))
    text, place = "".join(f"{dumps(line)}\n" for line in lines), file.expanduser().resolve()
    try:
        if place.exists() and not place.is_file():  # a device, or a pipe
            place.write_text(text, encoding="utf-8")
        else:
            write_atomically(place, text)
    except OSError as error:
        reason = f"generate.output={str(file)!r} can't be written ({error.strerror})"
        print(f"error: {reason}; the sequences that have ended are in {attempt.generated_file}", file=sys.stderr)
        return False
    return True


class Story:
    """Shows the text of the only sequence as it comes, after its prompt."""

    def __init__(self, attempt: Attempt) -> None:
        self._new = _NewContent(attempt.stream_file)
        _show(attempt.config().generate.prompt or "")

    def print_new(self) -> None:
        """What has come since the last call, up to whole characters."""
        _show(self._new.take(lambda content: len(content.decode(errors="ignore").encode())))


class Sequences:
    """Shows each sequence when it has ended."""

    def __init__(self, attempt: Attempt) -> None:
        self._new = _NewContent(attempt.generated_file)

    def print_new(self) -> None:
        """Those that have ended since the last call."""
        for line in map(json.loads, self._new.take(lambda content: content.rfind(b"\n") + 1).splitlines()):
            said = line["text"] if not line["finish_reason"].startswith("error") else line["finish_reason"]
            _show(f"[{line['number'] + 1}] {line['prompt'] or line['prompt_tokens']}\n{said}\n\n")


class _NewContent:
    """What has been added to a file, which may not be there yet."""

    def __init__(self, file: Path) -> None:
        self._file, self._position = file, 0

    def take(self, whole: Callable[[bytes], int]) -> str:
        """What is new.

        Args:
            whole: how many of these bytes can be taken by now.
        """
        try:
            with self._file.open("rb") as file:
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return ""
        taken = content[: whole(content)]
        self._position += len(taken)
        return taken.decode(errors="ignore")


def _show(text: str) -> None:
    """Print; a terminal gets no control characters but those of lines, which a model may generate, too."""
    if sys.stdout.isatty():
        text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    print(text, end="", flush=True)
