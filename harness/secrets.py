"""Secrets, which stand in no file: they come from the environment, and their text `${oc.env:NAME}` is what is written.

Only DeepSpeed has a use for secrets (the key of a monitor, say). So the text of a value in `deepspeed.*` travels as it
is, and each rank fills it in from its own environment when it builds the engine. What names a place is no secret and
is filled in at once. Any other value from the environment is refused, and so is a secret that is typed out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from harness.errors import ConfigError

PLACES = (
    "data.path", "data.tokenizer", "model.path", "model.weights", "generate.output", "generate.prompts_file",
    "results_dir", "train.resume",
)  # fmt: skip
"""Keys that hold paths."""
PROMPT = "generate.prompt"
"""A text that may hold anything: it is repeated as it is."""
OVERRIDES = "sweep.points"
"""Overrides of points, whose values are settled when each is composed."""

VARIABLE = re.compile(r"\$\{oc\.env:([^{}]+)\}")
SECRET = (
    r"[\w\-]*(?:(?:api|access|private|secret)[_\-]?keys?(?:[_\-]?id)?|secrets?|token|passw(?:or)?d\d*|pwd|passphrase|"
    r"credentials?|authorization)"
)
"""Names of keys that hold secrets."""
# Such a name in an override, and the begin of a value that is neither null, a flag nor an interpolation without a
# default.
TYPED_OUT = re.compile(
    rf"(?<![\w\-.])((?:[\w\-]+\.)*{SECRET})['\"]?\s*[=:]\s*['\"\\]*"
    r"(?!(?:null|none|true|false)(?=[\s'\",}\]]|$)|(?:(?:bearer|basic)\s+)?[^\s,]*\$\{(?!oc\.env:[^{}]*,))[^\s'\"\\,}\]]",
    re.IGNORECASE,
)
SHORTEST = 4
"""Characters of a value that is hidden in texts; shorter ones are no secrets, and half a text would go with them."""
LONGEST = 80
"""Characters of a setting that is told."""


class TypedOut(ConfigError):
    """A secret is typed out: what holds it is not to be repeated."""


def refuse_typed_out(overrides: Iterable[str]) -> None:
    """Refuse overrides that hold a secret, wherever in their text, before anything repeats it.

    Raises:
        TypedOut: it names the key, not the value.
    """
    for override in overrides:
        is_prompt = override.lstrip("+").startswith(f"{PROMPT}=")
        if not is_prompt and (found := TYPED_OUT.search(override)):
            raise _typed_out(found[1])


def settle(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A composed configuration with its places filled in.

    Args:
        raw: in which `${oc.env:NAME}` stands for values from the environment.

    Raises:
        TypedOut: a secret is typed out.
        ConfigError: a value from the environment would be written to files.
    """

    def settled(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not VARIABLE.search(value):
            if _is_secret(key) and value not in (None, "", True, False):
                raise _typed_out(key)
            return value
        if key in PLACES:
            return fill_in(value)
        if key.startswith("deepspeed.") or key in (OVERRIDES, PROMPT):
            return value
        raise ConfigError(
            f"{key}={value!r} would be written to files; only deepspeed.* and {', '.join(PLACES)} take values from "
            f"the environment: give {key} its value"
        )

    return dict(_map(raw, settled))


@lru_cache(maxsize=4096)
def _is_secret(key: str) -> bool:
    return any(re.fullmatch(SECRET, part, re.IGNORECASE) for part in key.split("."))


def _typed_out(key: str) -> TypedOut:
    return TypedOut(
        f"{key} is given a secret, which would be written to files; put it into an environment variable, and write "
        f"{key}='${{oc.env:NAME}}' with the name of that variable"
    )


def told(key: str, value: Any) -> str:
    """`KEY=VALUE` for people, on one short line; without the value where it may be a secret."""
    text = f"{key}={value}"
    if _is_secret(key) or TYPED_OUT.search(text):
        return f"{key}=..."
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def variables(value: Any) -> set[str]:
    """Environment variables that containers refer to."""
    names = set[str]()
    _map(value, lambda _, leaf: names.update(VARIABLE.findall(leaf)) if isinstance(leaf, str) else None)
    return names


def fill_in(value: Any) -> Any:
    """A copy of containers or a text in which values from the environment stand instead of `${oc.env:NAME}`.

    Raises:
        ConfigError: a variable is not set.
    """

    def look_up(variable: re.Match[str]) -> str:
        if variable[1] not in os.environ:
            raise ConfigError(f"{variable[0]} names a variable that is not in the environment; set {variable[1]}")
        return os.environ[variable[1]]

    return _map(value, lambda _, leaf: VARIABLE.sub(look_up, leaf) if isinstance(leaf, str) else leaf)


def hide(value: Any, names: Iterable[str]) -> Any:
    """A copy of containers or a text in which `${oc.env:NAME}` stands instead of the values of variables."""
    hidden = {
        form: instead
        for name in names
        if len(secret := os.environ.get(name, "")) >= SHORTEST
        for form, instead in _forms(secret, f"${{oc.env:{name}}}").items()
    }

    def hide_in(_: str, leaf: Any) -> Any:
        for secret in sorted(hidden, key=len, reverse=True) if isinstance(leaf, str) else ():
            leaf = leaf.replace(secret, hidden[secret])
        return leaf

    return _map(value, hide_in)


def _forms(secret: str, text: str) -> dict[str, str]:
    """How a secret may stand in a text, and what stands there instead.

    As it is, as Python and JSON quote it, and what is left of that where pydantic shortens whatever holds it, to its
    first 25 and last 24 characters.
    """
    whole = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    forms = dict.fromkeys(whole, text)
    for form in whole:
        for length in range(SHORTEST, min(len(form), 26)):
            forms[f"{form[:length]}..."] = f"{text}..."
            forms[f"...{form[-length:]}"] = f"...{text}"
    return forms


def _map(value: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """A copy of containers whose leaves are changed; `change` gets the dotted key (of a list, for its elements)."""
    if isinstance(value, Mapping):
        return {name: _map(child, change, f"{key}.{name}" if key else str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_map(child, change, key) for child in value]
    return change(key, value)
