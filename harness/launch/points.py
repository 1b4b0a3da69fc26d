"""What to run: the points that were asked for, whether they can run, what becomes of each, and its new attempts."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from harness.errors import ConfigError
from harness.launch.backends import backend_of
from harness.launch.compose import Composer, open_keys
from harness.launch.probe import measure_layers
from harness.machine import Machine
from harness.record.store import Attempt, Point, SweepDirectory, is_stale, write_atomically
from harness.secrets import PLACES, TypedOut
from harness.spec.config import REPOSITORY, Data, RunConfig
from harness.spec.generation import num_perplexity_samples
from harness.spec.identity import identity
from harness.spec.layer_seconds import MEASURED, NotMeasured
from harness.spec.resolve import MEASURABLE, load_config

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

    from harness.corpus import Corpus


def expand(
    arguments: Sequence[str],
    params: Mapping[str, Any],
    points: Any,
    config_loader: ConfigLoader | None = None,
) -> list[list[str]]:
    """The overrides of every point: the product of all swept keys and the explicit points.

    Args:
        arguments: overrides, some with several values: a,b,c or choice(...), range(...), glob(...).
        params: further keys and their values (`hydra.sweeper.params`); `arguments` win.
        points: `sweep.points`, a list of strings of overrides.

    Raises:
        ConfigError: values that can't be enumerated, several of what all points share, or points of another form.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    axes: dict[str, list[list[str]]] = {}
    for override in parser.parse_overrides(open_keys([*(f"{k}={v}" for k, v in params.items()), *arguments])):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [[str(override.input_line)]]
            continue
        if of_the_whole_sweep(key):
            raise ConfigError(f"{override.input_line}: all points of a sweep share {key}; give it one value")
        try:
            axes[key] = [[f"{key}={value}"] for value in override.sweep_string_iterator()]
        except HydraException:
            raise ConfigError(f"{override.input_line} has no countable values; list them: {key}=1,2,4") from None
    try:
        if isinstance(points, str):
            raise TypeError
        explicit = [shlex.split(point) for point in points] or [[]]
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"sweep.points={points} is no list of overrides; write sweep.points=['parallel.tp=2 parallel.pp=1','...']"
        ) from None
    for setting in itertools.chain(*explicit):
        if of_the_whole_sweep(setting.lstrip("+").partition("=")[0]):
            raise ConfigError(f"{setting} is no point's: all points of a sweep share it; put it beside sweep.points")
    return [list(itertools.chain(*choice)) for choice in itertools.product(*axes.values(), explicit)]


def of_the_whole_sweep(key: str) -> bool:
    """Whether a key of the configuration has one value in a sweep."""
    return key in ("launch.backend", "launch.slots", "results_dir") or key.partition(".")[0] == "sweep"


@dataclass(frozen=True)
class Candidate:
    """A point that was asked for, and whether it can run."""

    overrides: tuple[str, ...]
    raw: dict[str, Any] | None = None
    """What was composed."""
    config: RunConfig | None = None
    """None: refused."""
    identity: str = ""
    reason: str = ""
    """Of the refusal, one sentence."""


def check_configuration(raw: Mapping[str, Any], machine: Machine, may_measure: bool = True) -> RunConfig:
    """As `load_config`, and there is a backend to run it.

    Args:
        may_measure: measure the layers of its model where it asks for that and nobody did yet.

    Raises:
        ConfigError: the configuration can't be run.
    """
    try:
        config = load_config(raw, machine)
    except NotMeasured as missing:
        if not may_measure:
            raise
        measure_layers(missing.config, machine)
        config = load_config(raw, machine)
    backend_of(config)
    return config


def check_points(batch: Sequence[Sequence[str]], composer: Composer, machine: Machine) -> list[Candidate]:
    """Compose and check every point, its data included, before anything starts."""
    from harness.corpus import prepare_corpus

    prepare_once = cache(prepare_corpus)

    def check(overrides: tuple[str, ...]) -> Candidate:
        raw = None
        try:
            raw = composer.compose(overrides)
            config = check_configuration(raw, machine)
            identity = unattended_identity(config, prepare_once)
        except TypedOut:
            raise  # before the sweep leaves a trace
        except ConfigError as error:
            return Candidate(overrides, raw, reason=str(error))
        return Candidate(overrides, raw, config, identity)

    return [check(tuple(overrides)) for overrides in batch]


def unattended_identity(config: RunConfig, prepare: Callable[[Data, int, int, str], Corpus] | None = None) -> str:
    """As `data_identity`, of a run that gives nobody its text.

    Raises:
        ConfigError: likewise, and where a file is to be written.
    """
    if config.task == "generate" and config.generate.output is not None:
        raise ConfigError(
            f"generate.output={config.generate.output!r} is written by launchers/generate.py alone; start that, or "
            "leave it out: the folder of each run has a generated.jsonl"
        )
    return data_identity(config, prepare)


def data_identity(config: RunConfig, prepare: Callable[[Data, int, int, str], Corpus] | None = None) -> str:
    """Identity of the point, its data prepared.

    Args:
        prepare: stands in for `prepare_corpus`.

    Raises:
        ConfigError: the data can't be used.
    """
    if config.task == "forward":
        return identity(config, "random tokens")
    from harness.corpus import prepare_corpus  # numpy

    if config.task == "generate":
        from harness.prompts import prompts_fingerprint

        fingerprint = prompts_fingerprint(config)
        if num_perplexity_samples(config):
            fingerprint += f" {_held_out_fingerprint(config, prepare or prepare_corpus)}"
        return identity(config, fingerprint)

    length, objective = config.train.sequence_length, config.train.objective
    corpus = (prepare or prepare_corpus)(config.data, config.model.vocab_size, length, objective)
    if config.train.eval_interval and corpus.path is not None:
        _check_held_out(config, corpus, "train.eval_interval=0")
    return identity(config, corpus.fingerprint)


def _held_out_fingerprint(config: RunConfig, prepare: Callable[[Data, int, int, str], Corpus]) -> str:
    """Of the text that a generation's perplexity is measured on."""
    from harness.prompts import held_out_config

    held_out, without = held_out_config(config), "generate.perplexity_samples=0"
    length, objective = held_out.train.sequence_length, held_out.train.objective
    try:
        corpus = prepare(held_out.data, config.model.vocab_size, length, objective)
    except ConfigError as error:
        raise ConfigError(f"{error}; or measure no perplexity, with {without}") from None
    if corpus.path is not None:
        _check_held_out(held_out, corpus, without)
    return corpus.fingerprint


def _check_held_out(config: RunConfig, corpus: Corpus, without: str) -> None:
    length = config.train.sequence_length
    if config.data.documents != "cut":
        from harness.documents import held_out_documents

        if held_out_documents(corpus, config.train.objective) == 0:
            raise ConfigError(
                f"the text has one document only, of which data.documents={config.data.documents} can hold out none; "
                f"give more, or {without}"
            )
    elif not corpus.ranges(length)[1]:
        raise ConfigError(
            f"the text has {corpus.num_tokens} tokens, too few to hold out one of two samples of "
            f"train.sequence_length={length}; give a longer text, or {without}"
        )


@dataclass(frozen=True)
class Decision:
    """What becomes of a point that was asked for."""

    action: Literal["run", "reuse", "keep", "invalid"]
    """keep: it failed, and is not tried again."""
    why: str
    attempts: list[Attempt] = field(default_factory=list)
    """Earlier ones that count."""
    num_runs: int = 0
    """New ones it takes."""


def decide(config: RunConfig, point: Point, now: Mapping[str, Any]) -> Decision:
    """What becomes of a point that can run.

    Args:
        now: the environment; what was measured in another one is run again.
    """
    repeats, newest = config.sweep.repeats, point.newest_finished()
    if newest is None:
        return Decision("run", "interrupted before" if point.shown() else "not measured yet", num_runs=repeats)
    content = newest.status()
    status = content["status"]
    if is_stale(content.get("environment") or {}, now):
        return Decision("run", "stale: measured with other versions, hardware or code", num_runs=repeats)
    if status != "ok" and status not in config.sweep.retry:
        return Decision("keep", f"{status} before; sweep.retry=[{status}] runs it again", [newest])
    measured = point.measured_in(now)
    if missing := max(repeats - len(measured), int(status != "ok")):
        why = "not measured often enough" if status == "ok" else f"{status} before, and in sweep.retry"
        return Decision("run", why, measured, missing)
    return Decision("reuse", "measured already", measured)


def decide_all(candidates: Sequence[Candidate], sweep: SweepDirectory, now: Mapping[str, Any]) -> dict[Any, Decision]:
    """Identity of a point, or the overrides of one that can't run -> what becomes of it."""
    decisions: dict[Any, Decision] = {}
    for candidate in candidates:
        if candidate.config is None:
            decisions[candidate.overrides] = Decision("invalid", candidate.reason)
        elif candidate.identity not in decisions:
            point = sweep.point(candidate.config, candidate.identity)
            decisions[candidate.identity] = decide(candidate.config, point, now)
    return decisions


@dataclass(frozen=True)
class Run:
    """An attempt that counts for a point."""

    config: RunConfig
    attempt: Attempt
    reused: bool
    """Measured earlier."""


def open_runs(
    candidates: Sequence[Candidate], decisions: Mapping[Any, Decision], sweep: SweepDirectory
) -> dict[str, list[Run]]:
    """Identity -> runs of every point: those that count already, and new attempts.

    Points that can't run are recorded as such.
    """
    runs: dict[str, list[Run]] = {}
    for candidate in candidates:
        overrides, config = own_overrides(candidate.overrides), candidate.config
        if config is None:
            command = shlex.join(["python", _launcher(candidate.raw), *overrides])
            sweep.record_invalid(overrides, candidate.raw, candidate.reason, command)
        elif candidate.identity not in runs:
            sweep.forget_invalid(overrides)
            decision = decisions[candidate.identity]
            new = [new_attempt(config, sweep, candidate.identity, overrides) for _ in range(decision.num_runs)]
            runs[candidate.identity] = [
                *(Run(config, attempt, reused=True) for attempt in decision.attempts),
                *(Run(config, attempt, reused=False) for attempt in new),
            ]
    return runs


def interleave(runs: Sequence[Sequence[Run]]) -> list[Run]:
    """All points once, then all again: what changes with time, changes every point alike."""
    return [run for again in itertools.zip_longest(*runs) for run in again if run is not None]


def new_attempt(config: RunConfig, sweep: SweepDirectory, identity: str, overrides: Sequence[str]) -> Attempt:
    """Make the folder of a run, with its configuration and the command that repeats it.

    Raises:
        ConfigError: it can't be written.
    """
    sweep.prepare()
    point = sweep.point(config, identity)
    attempt = next(filter(_never_started, point.attempts()), None) or point.new_attempt()
    attempt.write_config(config)
    write_atomically(attempt.command_file, repeat_command(overrides, config) + "\n")
    attempt.write_status("pending", "it waits for its turn")
    return attempt


def _never_started(attempt: Attempt) -> bool:
    is_waiting = attempt.status()["status"] == "interrupted" and not attempt.log_file.exists()
    return is_waiting and not attempt.later_version()


def repeat_command(overrides: Sequence[str], config: RunConfig) -> str:
    """The command, from the repository root, that runs a point again; on this host with the user's `deepspeed`."""
    own = [_from_root(_in_numbers(override, config)) for override in own_overrides(overrides)]
    if config.task != "train":
        return shlex.join(["python", "launchers/generate.py", *own])
    return shlex.join([*backend_of(config).prefix(config), "launchers/train.py", *own])


def _launcher(raw: Mapping[str, Any] | None) -> str:
    """Of a point that was refused, as far as it could be composed."""
    is_training = raw is None or raw.get("task", "train") == "train"
    return "launchers/train.py" if is_training else "launchers/generate.py"


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that say nothing about a point."""
    return [override for override in overrides if not override.startswith("sweep.")]


def _in_numbers(override: str, config: RunConfig) -> str:
    """What was to be measured, as the numbers that it was."""
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    if section == "parallel" and name in MEASURABLE and value == MEASURED:
        return f"{key}={getattr(config.parallel, name)}".replace(" ", "")
    return override


def _from_root(override: str) -> str:
    """A path that was given from another folder, made absolute."""
    key, _, value = override.partition("=")
    path = Path(value)
    is_place = key in PLACES or (key == "parallel.schedule" and path.suffix.lower() == ".csv")
    is_there = path.exists() or (key == "generate.output" and path.parent.is_dir())
    if is_place and Path.cwd() != REPOSITORY and not path.is_absolute() and is_there:
        return f"{key}={path.resolve()}"
    return override
