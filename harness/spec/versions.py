"""Configurations of other versions: keys that came later, and what only a later version knows.

A key that has a default in harness/spec/config.py came later than the first published runs, and its default is the
value under which runs are as they were before it came. So a configuration without it means that value, and an
identity leaves the key out while it has it: adding a key makes no other points. Its default for new runs may be
another one, which stands in conf/ and changes the identity like any other value. A key of which only speed depends,
and results by roundings (`parallel.shared_memory`, `model.onednn`), has the default of new runs alone: to be fast is no
other point, and rows of code from before are stale anyway.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from harness.secrets import told
from harness.spec.config import RunConfig, Section
from harness.spec.engines import ENGINES
from harness.spec.schedules import SCHEDULES

MOST_TOLD = 3
"""Settings of a later version that are told of one configuration."""


def later_keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted keys that came later -> the value that stands for them in configurations from before.

    Those of a model's subclass are not among them: conf/model/ lists them.
    """
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        key, kind = prefix + name, field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= later_keys(kind, f"{key}.")
            if not field.is_required():  # all keys of a section that came later did
                found |= dict(_leaves(field.get_default(call_default_factory=True).model_dump(mode="json"), key))
        elif not field.is_required():
            found[key] = field.get_default(call_default_factory=True)
    return found


def later_in(section: Section) -> dict[str, Any]:
    """The keys of one section that came later -> the value that stands for them in configurations from before."""
    return later_keys(type(section))


def of_a_later_version(raw: Mapping[str, Any]) -> str:
    """What a configuration holds that this version doesn't know: `parallel.cp=2 is not known`; empty where nothing.

    Args:
        raw: of a run that was started; that of a refused point may hold anything.
    """
    settings = [told(key, value) for key, value in _unknown(raw)]
    if not settings:
        return ""
    more = f" and {len(settings) - MOST_TOLD} more" if len(settings) > MOST_TOLD else ""
    return f"{', '.join(settings[:MOST_TOLD])}{more} {'is' if len(settings) == 1 else 'are'} not known"


def _unknown(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of what this version doesn't know."""
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] in ("extra_forbidden", "literal_error"):
                yield from _leaves(problem["input"], ".".join(str(p) for p in problem["loc"] if _is_of_a_key(p)))
    else:  # names are checked against their tables, not by type
        tables: dict[str, Container[str]] = {"schedule": SCHEDULES, "engine": ENGINES}
        if config.parallel.schedule_passes is not None:
            tables.pop("schedule")
        names = {key: getattr(config.parallel, key) for key in tables}
        yield from ((f"parallel.{key}", name) for key, name in names.items() if name not in tables[key])


def _is_of_a_key(part: int | str) -> bool:
    """Whether a part of pydantic's location is one of the key, not the name of a validator or a union's member."""
    return str(part).isidentifier() or str(part).isdigit()


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested containers."""
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}")
    else:
        yield key, value
