"""Documentation: links, commands, keys and files that it names exist, and its examples do what they say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from pydantic import BaseModel

from harness.plan.simulate import simulate
from harness.spans.files import read_spans
from harness.spans.span import activity, measured_bubble
from harness.spec import schedules
from harness.spec.config import REPOSITORY, EmulatedModel, RunConfig

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "results" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
CAMPAIGNS = sorted((REPOSITORY / "results" / "published").glob("*/README.md"))
"""Their commands are those of their day; only their links are checked."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w./-])(?:harness|conf|tests|launchers|docs|\.ci)/[\w./*{},-]*[\w/*}]")
OVERRIDE = re.compile(r"\+{0,2}([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)=(.*)", re.DOTALL)
KEY = re.compile(r"[a-z]\w*(\.[a-z]\w*)+")
PLACEHOLDER = re.compile(r"[A-Z_]+|\.\.\.|")
HYDRA_APPS = ("train.py", "sweep.py", "verify.py", "comm_bench.py", "quickstart.sh")


def blocks(language: str, page: Path) -> list[str]:
    """The fenced blocks of a page that are in a language."""
    return [block for found, block in FENCE.findall(page.read_text()) if found == language]


def link_problems(page: Path, text: str) -> Iterator[str]:
    """Links to files and headings that are not there."""
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target} leads nowhere"
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            yield f"{target}: no heading is called #{anchor}"


def anchors(text: str) -> set[str]:
    """What a forge calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def file_problems(text: str) -> Iterator[str]:
    """Files of the repository that are named and not there; `*` and `{a,b}` stand for several."""
    for name in FILE.findall(text):
        for path in expand_braces(name):
            if not (any(REPOSITORY.glob(path)) if "*" in path else (REPOSITORY / path).exists()):
                yield f"{path} does not exist"


def expand_braces(path: str) -> list[str]:
    """`a/{b,c}.py` as the two that it stands for."""
    if match := re.search(r"\{([^}]*)\}", path):
        return [path[: match.start()] + part + path[match.end() :] for part in match[1].split(",")]
    return [path]


def command_problems(text: str) -> Iterator[str]:
    """Commands, in bash blocks or between backticks, with a program, an option or an override that is not there."""
    lines = [line for language, block in FENCE.findall(text) if language == "bash" for line in unfolded(block)]
    for code in [*lines, *INLINE.findall(FENCE.sub("", text))]:
        try:
            words = shlex.split(code, comments=True)
        except ValueError:  # no command line
            continue
        words = words[:1] if re.match(r"[a-z_.]+=", code) else words  # an override may hold spaces
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment
            words = words[1:]
        if words:
            yield from word_problems(words)


def unfolded(block: str) -> list[str]:
    """Lines of a shell block."""
    return block.replace("\\\n", " ").splitlines()


def word_problems(words: list[str]) -> Iterator[str]:
    """Of one command, or of a key or an override alone."""
    program, *arguments = words
    if program == "pytest":
        return  # its files are checked as all files are
    if program in ("python", "deepspeed"):
        script = next((word for word in arguments if word.endswith(".py")), None)
    else:
        script = program if re.match(r"(\./)?launchers/\w+\.|\./", program) else None
    if script is None:
        if len(words) == 1:
            yield from key_problems(program)
        return
    file = REPOSITORY / script
    if not file.exists():
        yield f"{script} does not exist"
        return
    after = arguments[arguments.index(script) + 1 :] if script in arguments else arguments
    for word in after:
        if word in ("|", "&&"):
            return
        if word.startswith("-"):
            if not has_option(file, word.split("=")[0]):
                yield f"{script} has no option {word}"
        elif "=" in word:
            yield from key_problems(word)


def has_option(file: Path, option: str) -> bool:
    """Whether a launcher or a program of tests/ knows an option; of what pytest gets, all are taken for known."""
    if file.name == "test.sh":
        return True
    if file.name in HYDRA_APPS and option in hydra_options():
        return True
    sources = [
        file,
        *map(module_file, re.findall(r"^\s*from (harness\.[\w.]+) import", file.read_text(), re.MULTILINE)),
    ]
    return any(f'"{option}"' in source.read_text() for source in sources if source.exists())


@cache
def hydra_options() -> frozenset[str]:
    return frozenset(option for action in get_args_parser()._actions for option in action.option_strings)


def module_file(module: str) -> Path:
    path = REPOSITORY / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def key_problems(word: str) -> Iterator[str]:
    """A configuration key, alone or with a value, that is not there; a group with a choice that is not there."""
    match = OVERRIDE.fullmatch(word)
    key, value = (match[1], match[2]) if match else (word, "")
    section = key.partition(".")[0]
    if not match and not (KEY.fullmatch(key) and section in RunConfig.model_fields and not is_file_name(key)):
        return
    if match and (REPOSITORY / "conf" / key).is_dir():
        for choice in value.split(","):
            if not PLACEHOLDER.fullmatch(choice) and not (REPOSITORY / "conf" / key / f"{choice}.yaml").exists():
                yield f"{key}={choice}: no such file in conf/{key}/"
    elif section not in ("deepspeed", "hydra") and key not in keys() and not is_inside_mapping(key):
        yield f"{key} is not a configuration key"


def is_file_name(key: str) -> bool:
    return key.endswith((".py", ".sh", ".yaml", ".md", ".csv", ".json", ".jsonl", ".txt", ".png"))


def is_inside_mapping(key: str) -> bool:
    """`cluster.peak_flops.bf16` and what else stands below a key that holds a mapping."""
    return key.rpartition(".")[0] in keys() - set(RunConfig.model_fields)


@cache
def keys() -> frozenset[str]:
    """Every key with its section, as the types and conf/ have them, and the bare names, which prose may use."""
    dotted = {*fields(RunConfig), *(f"model.{name}" for name in EmulatedModel.model_fields)}
    for file in (REPOSITORY / "conf").glob("*/*.yaml"):
        content = yaml.safe_load(file.read_text())
        if not file.read_text().startswith("# @package _global_") and isinstance(content, dict):
            dotted |= {f"{file.parent.name}.{name}" for name in content}
    return frozenset(dotted | {key.rpartition(".")[2] for key in dotted})


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section and of those inside it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in models(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


def models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def problems(page: Path, text: str) -> list[str]:
    return [*link_problems(page, text), *file_problems(text), *command_problems(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert problems(page, page.read_text()) == []


@pytest.mark.parametrize("page", CAMPAIGNS, ids=lambda page: page.parent.name)
def test_links_of_a_campaign_lead_somewhere(page: Path) -> None:
    assert list(link_problems(page, page.read_text())) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[that](docs/gone.md)", "docs/gone.md leads nowhere"),
        ("![picture](gone.png)", "gone.png leads nowhere"),
        ("[that](LICENSE#gone)", "LICENSE#gone: no heading is called #gone"),
        ("# Here\n[that](#there)", "#there: no heading is called #there"),
        ("See `harness/gone.py`.", "harness/gone.py does not exist"),
        ("See `conf/gone/*.yaml`.", "conf/gone/*.yaml does not exist"),
        ("```\nharness/spec/{config,gone}.py\n```", "harness/spec/gone.py does not exist"),
        ("```bash\npython launch.py parallel.tp=2\n```", "launch.py does not exist"),
        ("```bash\n./gone.sh\n```", "./gone.sh does not exist"),
        ("`python launchers/train.py parallel.cp=2`", "parallel.cp is not a configuration key"),
        ("`launch.gone_seconds`", "launch.gone_seconds is not a configuration key"),
        ("`train.step=5`", "train.step is not a configuration key"),
        ("`python launchers/sweep.py model=gpt2_tiny,gpt5`", "model=gpt5: no such file in conf/model/"),
        ("`python launchers/report.py results/NAME --html`", "launchers/report.py has no option --html"),
        ("`python launchers/train.py --gone`", "launchers/train.py has no option --gone"),
        ("```bash\npython tests/slips.py \\\n  --gone 4\n```", "tests/slips.py has no option --gone"),
    ],
)
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    assert problem in problems(REPOSITORY / "README.md", text)


@pytest.mark.parametrize(
    "text",
    [
        "[there](https://example.org/gone) [here](docs/README.md)",
        "# A title, with: `punctuation`!\n[See](#a-title-with-punctuation)",
        "```bash\nA=0 python launchers/train.py --cfg job model=llama_tiny cluster.peak_flops.bf16=1e12  # so\n```",
        "`sweep=NAME`, `tracking.wandb.mode=online`, `deepspeed.comet.api_key=1`, `zero_stage=1`, `sweep.yaml`, `x.y`",
        "`python tests/benchmarks/overhead.py --pairs 4` and `harness/**/*.py`, but not ../harness/gone.py",
    ],
)
def test_what_exists_is_not_reported(text: str) -> None:
    assert problems(REPOSITORY / "README.md", text) == []


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 130


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {REPOSITORY / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())}
        new |= {link for link in links if link.suffix == ".md" and link.exists()} - reached
    assert set(PAGES) - reached == set()


def test_the_architecture_names_every_room_and_every_launcher() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (REPOSITORY / "harness").glob("*/__init__.py")]
    files = [f"harness/{path.name}" for path in (REPOSITORY / "harness").glob("*.py") if path.stem != "__init__"]
    launchers = [path.name for path in (REPOSITORY / "launchers").glob("*.py")]
    assert [name for name in [*rooms, *files, *launchers] if not re.search(rf"(?<!\w){re.escape(name)}", text)] == []


LETTERS = {"forward": "Ff", "backward": "Bb", "backward_input": "Ii", "backward_weight": "Ww"}


@pytest.mark.parametrize(
    ("drawn", "name", "num_stages", "num_chunks"),
    [
        (schedules.gpipe.__doc__, "gpipe", 3, 1),
        (schedules.one_forward_one_backward.__doc__, "1f1b", 3, 1),
        ((REPOSITORY / "docs" / "concepts.md").read_text(), "1f1b", 3, 1),
        (schedules.interleaved.__doc__, "interleaved", 2, 2),
        (schedules.zb_h1.__doc__, "zb_h1", 3, 1),
        (schedules.dualpipev.__doc__, "dualpipev", 2, 2),
        (schedules.zero_bubble.__doc__, "zb_v", 2, 2),
    ],
)
def test_schedules_are_as_drawn(drawn: str, name: str, num_stages: int, num_chunks: int) -> None:
    schedule = schedules.build_schedule(name, num_stages, num_micro_batches=4, num_chunks=num_chunks)
    seconds = {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1}
    simulated = simulate(schedule, {kind: num_chunks * seconds[kind] for kind in schedule.computes})
    rows = re.findall(r"^ *stage \d   (.*)$", drawn, re.MULTILINE)
    assert len(rows) == num_stages
    for row, spans, instructions in zip(rows, simulated, schedule.stages, strict=True):
        columns = ["."] * len(row.split())
        for span, instruction in zip(spans, instructions, strict=True):
            if span.kind in schedule.computes:
                letter = LETTERS[span.kind][instruction.chunk]
                begin, end = round(span.start_ns / 1e9), round(span.end_ns / 1e9)
                columns[begin:end] = [f"{letter}{span.micro_batch}"] * (end - begin)
        assert row.split() == columns


def test_the_lines_in_the_documentation_recompute_a_bubble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = REPOSITORY / "results" / "published" / "2026-11-quickstart-2-cores"
    (lines,) = blocks("python", REPOSITORY / "docs" / "concepts.md")
    monkeypatch.chdir(published)
    exec(lines, {})
    ranks = [read_spans(file).instructions(step=5) for file in sorted(published.glob("spans/*.jsonl"))]
    bubble = measured_bubble([[activity(spans)] for spans in ranks])
    assert float(capsys.readouterr().out) == pytest.approx(bubble.fraction, abs=1e-9)
