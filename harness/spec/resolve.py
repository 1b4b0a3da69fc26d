"""From what Hydra composed to a checked `RunConfig`: values that follow are filled in, types and sizes are checked.

A mistake raises `ConfigError` with one sentence: what is wrong, the values, and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.checkpoints import find_checkpoint
from harness.errors import ConfigError
from harness.machine import Machine
from harness.spec.checks import check
from harness.spec.config import REPOSITORY, RunConfig
from harness.spec.families import FAMILIES
from harness.spec.initial_weights import with_shape
from harness.spec.layer_seconds import MEASURED, NotMeasured, layer_seconds_file, read_layer_seconds
from harness.spec.partition import balance, layers_per_part
from harness.spec.schedule_files import read_schedule
from harness.spec.schedules import SCHEDULES, kind_of_passes, placement_of
from harness.spec.transformers_config import resolve_model

MEASURABLE: dict[str, Any] = {"partition": "uniform", "schedule_seconds": [[1.0, 1.0, 1.0]]}
"""Keys of `parallel` whose numbers may be measured, and what stands for them until then."""


def load_config(raw: Mapping[str, Any], machine: Machine) -> RunConfig:
    """Resolve, type and check what Hydra composed.

    Args:
        raw: plain containers, the composed configuration.
        machine: what the run will find; fills in `dp=fill` and the threads.

    Raises:
        ConfigError: the configuration can't be run.
    """
    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for name, field in RunConfig.model_fields.items():
        if name != "results_dir" and field.is_required() and not isinstance(raw.get(name), dict):
            raise ConfigError(f"{name}={raw.get(name)!r} is not a section; give it keys, such as {name}.KEY=VALUE")
    raw["model"] = resolve_model(with_shape(raw["model"]))
    _resolve_objective(raw["model"], raw["train"])
    if raw.get("results_dir") is None:
        raw["results_dir"] = str(REPOSITORY / "results")
    if isinstance(resume := raw["train"].get("resume"), str):
        raw["train"]["resume"] = str(find_checkpoint(resume))
    _resolve_dp(raw["parallel"], machine)
    _resolve_schedule(raw["parallel"])
    _resolve_threads(raw["launch"], raw["parallel"], machine)
    measured = [key for key in MEASURABLE if raw["parallel"].get(key) == MEASURED]
    raw["parallel"] |= {key: MEASURABLE[key] for key in measured}
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None
    check(config, machine)
    if config.parallel.pp == 1 and "partition" in measured:
        measured.remove("partition")  # there is but one
    if measured:
        config = _with_measured(config, measured, machine)
        check(config, machine)
    return config


def _with_measured(config: RunConfig, keys: Sequence[str], machine: Machine) -> RunConfig:
    """Numbers for what is to be measured.

    Raises:
        NotMeasured: they are not known.
    """
    seconds = read_layer_seconds(layer_seconds_file(config, machine))
    if seconds is None:
        raise NotMeasured(" and ".join(f"parallel.{key}={MEASURED}" for key in keys), config)
    parallel = config.parallel
    if "partition" in keys:
        first, block, last = (sum(part) for part in (seconds.embedding, seconds.block, seconds.head))
        partition = balance(config.model.num_hidden_layers, placement_of(parallel), block, first, last)
        parallel = parallel.model_copy(update={"partition": partition})
    if "schedule_seconds" in keys:
        of_parts = seconds.of_parts(layers_per_part(config.model, parallel, config.train.sequence_length))
        parallel = parallel.model_copy(update={"schedule_seconds": of_parts})
    return config.model_copy(update={"parallel": parallel})


def _resolve_objective(model: dict[str, Any], train: dict[str, Any]) -> None:
    """Replace null by what the family is made for, and let it say what a token sees."""
    family = model.get("family")
    known = FAMILIES.get(family) if isinstance(family, str) else None
    if train.get("objective") is None:
        train["objective"] = "causal" if known is None or known.causal else "masked"
    causal = train["objective"] != "masked"
    if model.setdefault("causal", causal) != causal:
        raise ConfigError(
            f"model.causal={model['causal']} contradicts train.objective={train['objective']}, from which it follows; "
            "leave it out"
        )


def _resolve_dp(parallel: dict[str, Any], machine: Machine) -> None:
    """Replace `fill` by the number of replicas that uses every device."""
    if parallel.get("dp") != "fill":
        return
    tp, pp = parallel.get("tp"), parallel.get("pp")
    if not (isinstance(tp, int) and isinstance(pp, int) and tp >= 1 and pp >= 1):
        parallel["dp"] = 1  # typing reports tp or pp
        return
    if machine.num_devices % (tp * pp):
        raise ConfigError(
            f"parallel.dp=fill can't share {machine.num_devices} devices among tp x pp = {tp * pp} ranks; "
            "choose tp x pp that divides the number of devices, or give parallel.dp a number"
        )
    parallel["dp"] = machine.num_devices // (tp * pp)


def _resolve_schedule(parallel: dict[str, Any]) -> None:
    """Read a schedule's file, whose name remains; replace null chunks by what the schedule has."""
    schedule, kind = parallel.get("schedule"), None
    passes = parallel.get("schedule_passes")
    is_file = isinstance(schedule, str) and schedule.lower().endswith(".csv")
    if is_file and passes is None:
        file = Path(str(schedule)).expanduser()
        parallel["schedule"], parallel["schedule_passes"] = file.name, read_schedule(file)
        passes = parallel["schedule_passes"]
    elif passes is not None and not is_file:
        raise ConfigError(
            f"parallel.schedule_passes is what a file holds, but parallel.schedule={schedule} is none; leave it out, "
            "or use parallel.schedule=FILE.csv"
        )
    if isinstance(passes, list) and all(isinstance(row, str) for row in passes):
        try:
            kind = kind_of_passes(tuple(passes))
        except ValueError as error:
            raise ConfigError(f"parallel.schedule={parallel.get('schedule')}: {error}") from None
    elif isinstance(schedule, str):
        kind = SCHEDULES.get(schedule)
    if parallel.get("num_chunks") is None:
        parallel["num_chunks"] = kind.num_chunks if kind else 1


def _resolve_threads(launch: dict[str, Any], parallel: dict[str, Any], machine: Machine) -> None:
    """Replace null by cores / (ranks x slots): more threads than cores make ranks wait for each other."""
    if launch.get("threads_per_rank") is not None:
        return
    degrees = [parallel.get(axis) for axis in ("tp", "pp", "dp")]
    world_size = 1
    for degree in degrees:
        world_size *= degree if isinstance(degree, int) and degree >= 1 else 1
    slots = launch.get("slots")
    shares = world_size * (slots if isinstance(slots, int) and slots >= 1 else 1)
    launch["threads_per_rank"] = max(1, machine.num_cores // shares)


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence."""
    # A union reports each alternative: a list was not meant to be one of the words.
    problems = error.errors()
    problem = next(
        (p for p in problems if p["type"] != "literal_error" or not isinstance(p["input"], list)), problems[0]
    )
    location = [str(part) for part in problem["loc"]]
    path = [part for part in location if part.isidentifier() or part.isdigit()]
    key, value = ".".join(path), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a configuration key" + _suggestion(path)
    if problem["type"] == "missing":
        return f"{key} is missing; give it a value"
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}={value!r} is not valid: {expected}"


def _suggestion(path: list[str]) -> str:
    """`; did you mean ...` for a misspelt key, else the keys there are."""
    section: Any = RunConfig
    for part in path[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    names = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(path[-1], names, n=1)
    if close:
        return f"; did you mean {'.'.join([*path[:-1], close[0]])}?"
    return f"; {'.'.join(path[:-1]) or 'the configuration'} has: {', '.join(names)}"
