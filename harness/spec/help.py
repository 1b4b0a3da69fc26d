"""`--help` of the launchers: what there is to start, and every configuration key with its default and its meaning.

Nothing is said twice: a launcher's first line says what it does, the folders of conf/ are the groups, their files the
choices and defaults, and the docstrings of `harness.spec.config` the meanings. Hydra takes no part, so that the answer
comes at once.
"""

from __future__ import annotations

import ast
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.spec.config import REPOSITORY, RunConfig

CONF = REPOSITORY / "conf"
FLAGS = frozenset({"--help", "-h"})
EVERYTHING = "all"


OVERVIEW = """\
Shardwright trains a transformer under one TP x PP x DP layout, or sweeps a grid of them.

Usage: {usage}
{options}
Launchers:
{launchers}

An override is KEY=VALUE, such as parallel.tp=2 train.steps=50, or GROUP=NAME, which takes a file of
conf/GROUP/, such as model=llama_tiny. Groups, each with its files, first the one taken without an override:

{groups}

Keys without a group:
{others}

--help GROUP or --help KEY tells what each key means, --help all all of them. --cfg job shows a
configuration without running it, --hydra-help the options of Hydra, which composes it.
"""


@dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    name: str
    """Dotted, such as train.steps."""
    default: str
    """As it is typed; that of the group's file that conf/config.yaml chooses."""
    meaning: str
    choices: tuple[str, ...]
    """The values it takes, where they can be listed."""


def answer_help(command: Sequence[str] | None = None) -> None:
    """End the process with an answer where its command line asks for help.

    Args:
        command: the launcher and its arguments, default `sys.argv`; what follows `--help` names groups or keys.

    Raises:
        SystemExit: 0 with the answer on stdout; 2 with a sentence on stderr where a name is not known.
    """
    launcher, *arguments = command or sys.argv
    first = next((i for i, argument in enumerate(arguments) if argument in FLAGS), None)
    if first is None:
        return
    following = takewhile(lambda argument: not argument.startswith("-"), arguments[first + 1 :])
    topics = [topic for topic in following if "=" not in topic]
    sections = [section(topic) for topic in topics]
    if None in sections:
        _refuse(topics[sections.index(None)])
    answer = "\n\n".join(text for text in sections if text) if topics else overview(Path(launcher).name)
    try:
        print(answer, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _refuse(topic: str) -> NoReturn:
    known = [EVERYTHING, *groups(), *(key.name for key in all_keys())]
    same = [name for name in known if name.rpartition(".")[2] == topic]
    near = same or difflib.get_close_matches(topic, known, n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"groups are {', '.join(groups())}"
    print(f"error: {topic} is no group and no key; {remedy}", file=sys.stderr)
    sys.exit(2)


def overview(launcher: str) -> str:
    """The short answer: how `launcher` is called, all launchers, all groups, and how to see more."""
    found = launchers()
    starts = [_entry(name, what, usage) for name, (what, usage, _) in found.items()]
    sections = [_entry(group, _meaning_of(group), ", ".join(choices(group))) for group in groups()]
    others = [line for key in all_keys() if "." not in key.name for line in _shown(key)]
    _, usage, options = found.get(launcher, ("", "", ""))
    return OVERVIEW.rstrip().format(
        usage=usage,
        options=textwrap.indent(f"\n{options}\n", "  ") if options else "",
        launchers="\n".join(starts),
        groups="\n".join(sections),
        others="\n".join(others),
    )


def _entry(name: str, *texts: str) -> str:
    """A name, and beside it texts, each on lines of its own."""
    first, others = f"  {name:<14} ", " " * 17
    lines = [line for text in texts if text for line in _wrapped(text, others, others)]
    return first + "\n".join(lines)[len(first) :]


def section(topic: str) -> str | None:
    """The keys of a group, one key, or all; None where there is nothing of that name."""
    found = [key for key in all_keys() if topic == EVERYTHING or key.name == topic or key.name.startswith(f"{topic}.")]
    listed = choices(topic) if topic in groups() else []
    if not found and not listed:
        return None
    lines = [f"{topic}: {meaning}" if (meaning := _meaning_of(topic)) else f"{topic}:"]
    if len(listed) > 1 or (listed and not found):
        lines += _wrapped(", ".join(listed), f"  {topic}=NAME  ", " " * len(f"  {topic}=NAME  "))
    for key in found:
        lines += _shown(key)
    return "\n".join(lines)


def launchers() -> dict[str, tuple[str, str, str]]:
    """File name -> what it does, how it is called, and its options, of everything in launchers/ that can be started."""
    found = {}
    for file in sorted((REPOSITORY / "launchers").glob("*.*")):
        if file.suffix == ".py":
            first, _, options = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")
            what, _, usage = first.partition(": `")
            found[file.name] = (f"{what}.", usage.replace("`", "").rstrip("."), options)
        elif os.access(file, os.X_OK):
            comment = file.read_text().splitlines()[1].removeprefix("# ")
            found[file.name] = (comment, f"./launchers/{file.name}", "")
    return found


def groups() -> list[str]:
    """Names that `--help` takes: sections of the configuration, and the other folders of conf/."""
    folders = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    sections = [name for name in RunConfig.model_fields if _section_of(name) is not None]
    return [*sections, *(name for name in folders if name not in sections)]


def choices(group: str) -> list[str]:
    """The files of a group, the one first that conf/config.yaml chooses."""
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return sorted(names, key=lambda name: name != _chosen().get(group))


@cache
def all_keys() -> list[Key]:
    """Every key of the schema, in its order."""
    root = yaml.safe_load((CONF / "config.yaml").read_text())
    found = []
    for name, field in RunConfig.model_fields.items():
        if (schema := _section_of(name)) is None:
            found.append(_key(name, field, root))
        else:
            found += _keys(schema, name, _content(name, _chosen().get(name, "default")))
    return found


def _keys(schema: type[BaseModel], prefix: str, values: Mapping[str, Any]) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        inner = _schema(field)
        if inner is None:
            yield _key(f"{prefix}.{name}", field, values)
        else:
            yield from _keys(inner, f"{prefix}.{name}", values.get(name) or {})
    for special in schema.__subclasses__():  # such as that of emulated models, with keys of its own
        own = {name: field for name, field in special.model_fields.items() if name not in schema.model_fields}
        for choice in choices(prefix):
            if own.keys() <= (content := _content(prefix, choice)).keys():
                for name, field in own.items():
                    key = _key(f"{prefix}.{name}", field, content)
                    yield Key(key.name, key.default, f"With {prefix}={choice}: {key.meaning}", key.choices)
                break


def _key(name: str, field: FieldInfo, values: Mapping[str, Any]) -> Key:
    default = values.get(name.rpartition(".")[2], None if field.is_required() else field.default)
    literals = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return Key(name, _as_typed(default), " ".join((field.description or "").split()), tuple(map(str, literals)))


def _as_typed(value: Any) -> str:
    if isinstance(value, str):
        return value
    return (
        str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)).removesuffix("...\n").strip()
    )


def _section_of(group: str) -> type[BaseModel] | None:
    field = RunConfig.model_fields.get(group)
    return _schema(field) if field is not None else None


def _schema(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _meaning_of(topic: str) -> str:
    schema = _section_of(topic)
    return (schema.__doc__ or "").partition("\n")[0] if schema else ""


@cache
def _chosen() -> dict[str, str]:
    """Group -> the file of it that conf/config.yaml chooses."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _content(group: str, name: str) -> dict[str, Any]:
    """Keys of a file, and of those of its group that it builds on."""
    file = CONF / group / f"{name}.yaml"
    own = (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
    content: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        content |= _content(group, base) if isinstance(base, str) and base != "_self_" else {}
    return content | own


def _shown(key: Key) -> list[str]:
    values = f"  ({', '.join(key.choices)})" if key.choices else ""
    return [f"  {key.name}={key.default}{values}", *_wrapped(key.meaning, " " * 6, " " * 6)]


def _wrapped(text: str, first: str, others: str) -> list[str]:
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
