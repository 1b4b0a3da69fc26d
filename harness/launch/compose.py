"""From overrides to one plain configuration: Hydra composes, and its errors become one sentence."""

from __future__ import annotations

import copy
import difflib
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from omegaconf.resolvers import oc

from harness.errors import ConfigError
from harness.secrets import refuse_typed_out, settle
from harness.spec.config import REPOSITORY
from harness.spec.initial_weights import NOT_THE_SHAPE
from harness.spec.versions import later_keys

CONF = REPOSITORY / "conf"

SCALARS = (str, int, float, bool, type(None))
"""Types of values that are set in place, and set back."""

Load = Callable[[list[str]], DictConfig]
"""Overrides -> composed configuration, by any way Hydra has."""


def compose(overrides: Sequence[str], config_name: str = "config") -> dict[str, Any]:
    """Plain containers of conf/ with `overrides` applied and interpolations resolved.

    Raises:
        ConfigError: an override that is misspelt, names nothing or leads nowhere.
    """
    overrides = open_keys(overrides)
    with one_sentence(overrides):
        return refuse_shape(overrides, plain(_load(list(overrides), config_name)))


class Composer:
    """Composes many points: once per distinct set of group choices, which takes Hydra 75 ms each.

    Plain KEY=VALUE overrides are applied to what that gave, and undone; the result equals `compose`.
    """

    def __init__(self, load: Load | None = None) -> None:
        self._load = load or _load
        self._bases: dict[tuple[str, ...], tuple[DictConfig, dict[str, Any]]] = {}

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """As the function of the same name."""
        return refuse_shape(overrides, self._compose(open_keys(overrides)))

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        with one_sentence(overrides, self._load):
            parsed = [_parse(override) for override in overrides]
            choices = [override for override in parsed if not _is_value(override)]
            if not all(map(_is_choice, choices)):
                return plain(self._load(list(overrides)))
            base, unresolved = self._base(tuple(str(choice.input_line) for choice in choices))
            values = [override for override in parsed if _is_value(override)]
            before = {override.key_or_group: _at(unresolved, override.key_or_group) for override in values}
            if not all(isinstance(value, SCALARS) for value in [*before.values(), *(o.value() for o in values)]):
                return self._plain_with(copy.deepcopy(base), values)  # takes three times as long
            try:
                return self._plain_with(base, values)
            finally:
                for key, value in before.items():
                    OmegaConf.update(base, key, value)

    def _plain_with(self, config: DictConfig, values: Sequence[Override]) -> dict[str, Any]:
        for override in values:
            self._update(config, override)
        return plain(config)

    def _update(self, config: DictConfig, override: Override) -> None:
        key = override.key_or_group
        try:
            OmegaConf.update(config, key, override.value(), force_add=override.is_force_add())
        except (ConfigAttributeError, ConfigKeyError):
            raise ConfigError(_unknown_key(key, self._load)) from None

    def _base(self, choices: tuple[str, ...]) -> tuple[DictConfig, dict[str, Any]]:
        """What Hydra composes, and the same in plain containers with its interpolations as they are written."""
        if choices not in self._bases:
            config = _without_hydra(self._load(list(choices)))
            self._bases[choices] = config, cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))
        return self._bases[choices]


def run_hydra(argv: Sequence[str], config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Hydra's own command line: its flags (--help, --cfg, --info ...), one run or a multirun of `task`.

    Raises:
        ConfigError: as `compose`.
        SystemExit: Hydra printed what was asked for, or refused a flag.
    """
    sys.argv[1:] = argv = open_keys(argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing a stack and exiting with 1
    with one_sentence([argument for argument in argv if not argument.startswith("-")]):
        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(task)()


def open_keys(overrides: Sequence[str]) -> list[str]:
    """Let overrides name keys that no file lists: those of DeepSpeed, and those that came later.

    `load_config` checks them.
    """
    later = later_keys()

    def is_open(override: str) -> bool:
        key = override.partition("=")[0]
        return key.startswith("deepspeed.") or (key in later and not _is_listed(key))

    return [f"++{override}" if is_open(override) else override for override in overrides]


@lru_cache(maxsize=4096)
def _is_listed(key: str) -> bool:
    """Whether every file of the key's group sets it."""
    section, _, name = key.rpartition(".")
    files = [*(CONF / section).glob("*.yaml")] if section else [CONF / "config.yaml"]
    return bool(files) and all(name in _keys(file) for file in files)


def plain(config: DictConfig) -> dict[str, Any]:
    """Built-in containers, interpolations resolved, without Hydra's own node; `${oc.env:NAME}` as `settle` does.

    Raises:
        ConfigError: as `settle`.
    """
    with environment_as_text():
        return settle(cast("dict[str, Any]", OmegaConf.to_container(_without_hydra(config), resolve=True)))


def refuse_shape(overrides: Iterable[str], raw: dict[str, Any]) -> dict[str, Any]:
    """What `overrides` composed, unless one sets the shape of a model whose weights bring their own.

    Raises:
        ConfigError: it names the override.
    """
    model = raw.get("model")
    weights = model.get("weights") if isinstance(model, dict) else None
    for override in overrides if weights is not None else ():
        section, _, key = override.lstrip("+~").partition("=")[0].partition(".")
        if section == "model" and key and key not in NOT_THE_SHAPE:
            raise ConfigError(
                f"{override} can't be set beside model.weights={weights!r}, which brings the shape of its model; leave "
                f"model.{key} out"
            )
    return raw


@contextmanager
def environment_as_text() -> Iterator[None]:
    """Within this context `${oc.env:NAME}` resolves to itself where the variable is set, else to its default."""

    def leave(name: str, *default: Any) -> str | None:
        return f"${{oc.env:{name}}}" if name in os.environ else oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", leave, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _load(overrides: list[str], config_name: str = "config") -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def _without_hydra(config: DictConfig) -> DictConfig:
    with open_dict(config):
        config.pop("hydra", None)
    return config


@lru_cache(maxsize=4096)
def _parse(override: str) -> Override:
    return _parser().parse_overrides([override])[0]


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _at(tree: Any, key: str) -> Any:
    """What stands at `section.name`; an empty dict where nothing does."""
    for part in key.split("."):
        tree = tree.get(part, {}) if isinstance(tree, dict) else {}
    return tree


def _is_value(override: Override) -> bool:
    """KEY.KEY=VALUE, which can't be a choice of a group."""
    sets = override.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD) and not override.is_sweep_override()
    return sets and "." in override.key_or_group and not override.package and not override.is_hydra_override()


def _is_choice(override: Override) -> bool:
    """GROUP=NAME or a scalar at the root, which no KEY.KEY=VALUE can touch: their order means nothing."""
    return override.type is OverrideType.CHANGE and not isinstance(override.value(), (dict, list, type(None)))


@contextmanager
def one_sentence(overrides: Sequence[str], load: Load | None = None) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a ConfigError.

    Args:
        overrides: what was asked for.
        load: to look up the keys there are.
    """
    refuse_typed_out(overrides)
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, load or _load)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration file can't be read: {' '.join(str(error).split())}; correct it") from error
    except RecursionError as error:
        raise ConfigError(
            f"{' '.join(overrides) or 'the configuration'} leads in a circle or too deep: a file's defaults name each "
            "other; correct them"
        ) from error
    except ValueError as error:
        if str(error).startswith("Config group override"):
            raise ConfigError(_not_a_choice(overrides)) from error
        if key := _no_element(overrides, str(error)):
            raise ConfigError(f"{key} names no element of a list; write {key.rpartition('.')[0]}=[...]") from error
        raise


def _sentence(error: Exception, load: Load) -> str:
    message = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error.missing_cfg_file, error.options or ())
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} can't be read as an override; write KEY=VALUE, and quote texts with '=' or spaces"
    if match := re.match(r"Could not override '([^']+)'", message):
        return _unknown_key(match[1], load)
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", message):
        key, _, values = match[1].partition("=")
        return f"{match[1]} names several values; use launchers/sweep.py to run each, or {key}=[{values}] for a list"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(message)}; correct its value"
    return f"{_first_line(message)}; correct the override"


def _no_such_option(file: str, options: Sequence[str]) -> str:
    group, _, name = file.rpartition("/")
    if not group:
        return f"{name!r} is no file of {CONF}; name a configuration there is"
    return f"{group}={name} is not available; choose one of {', '.join(options)}"


def _not_a_choice(overrides: Sequence[str]) -> str:
    """A group got a number or null."""
    for override in overrides:
        key, _, value = override.partition("=")
        if (CONF / key).is_dir():
            return _no_such_option(f"{key}/{value}", sorted(file.stem for file in (CONF / key).glob("*.yaml")))
    return f"{' '.join(overrides)}: a group takes the name of one of its files"


def _no_element(overrides: Sequence[str], message: str) -> str | None:
    """The key that asks for the element x of a list, if that is what OmegaConf says: `list.x=3`."""
    match = re.match(r"invalid literal for int\(\) with base 10: '(.*)'$", message)
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    return next((key for key in keys if match and "." in key and key.rpartition(".")[2] == match[1]), None)


def _unknown_key(key: str, load: Load) -> str:
    known = [
        *_dotted(plain(load([]))),
        *later_keys(),
        *(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"),
    ]
    section, _, name = key.rpartition(".")
    owners = [file.stem for file in sorted((CONF / section).glob("*.yaml")) if name in _keys(file)]
    close = difflib.get_close_matches(key, known, n=1)
    if section and owners:
        remedy = f"only {section}={' and '.join(owners)} has it"
    else:
        remedy = f"did you mean {close[0]}?" if close else "launchers/train.py --cfg job lists them all"
    return f"{key} is not a configuration key; {remedy}"


def _keys(file: Path) -> Container[Any]:
    """What a file of a group sets; nothing where it can't be read, which is not what is asked."""
    try:
        return OmegaConf.load(file)
    except Exception:
        return ()


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`train.steps` and the like, every level."""
    for key, value in section.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0].rstrip(".") if message.strip() else "the configuration can't be composed"
