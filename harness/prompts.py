"""Prompts as tokens before anything starts, and tokens as text while they come.

Which tokenizer belongs to a generation, the first of these that there is:

1. `data.tokenizer`, where it names a folder;
2. that of a checkpoint of ours that was trained on text: a folder by its path, if it is still there, or `bytes`;
3. that in the folder of `transformers` that `model.weights` is, or that its checkpoint carries along;
4. `bytes`, whose tokens are those of UTF-8.

Prompts are tokenized as `tokenizer(text)` of `transformers` does, special tokens included; text that was generated has
none of them, and spaces as the tokens have them.

A mistake that concerns all prompts raises `ConfigError`; one that concerns a prompt among several is its `problem`, and
the others are generated from. No torch here, and `transformers` only where a folder has the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.checkpoints import CARRIED, read_meta
from harness.corpus import draw, load_pretrained_tokenizer
from harness.errors import ConfigError
from harness.spec.config import Generate, Model, RunConfig
from harness.spec.generation import num_perplexity_samples
from harness.spec.initial_weights import is_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"
)  # fmt: skip
"""A folder of `transformers` with one of these has a tokenizer."""
EOS_FILES = ("generation_config.json", "config.json")
"""Where such a folder says which tokens end a text, the first that does."""
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no UTF-8, or not yet."""
SHOWN = 60
"""Characters of a text that messages show."""


class Tokenizer(NamedTuple):
    """Text to tokens and back."""

    encode: Callable[[str], list[int]]
    """Tokens of a prompt, with the special tokens that the model expects."""
    decode: Callable[[Sequence[int]], str]
    """Text without special tokens; whatever the tokens, it is some."""
    end_tokens: tuple[int, ...]
    """After which a text is at its end."""
    num_ids: int
    """Tokens are below this number."""


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with."""

    prompt: str | None
    """None where only tokens were given, or drawn."""
    tokens: list[int]
    problem: str = ""
    """Why nothing can be generated from it; empty where something can."""


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """The tokenizer of a generation, by the rule above.

    Raises:
        ConfigError: its folder holds none that can be loaded.
    """
    name, weights = tokenizer_name(config), config.model.weights
    if config.data.tokenizer == "bytes" and weights is not None:
        return load_tokenizer(name, f"the tokenizer {name!r} of model.weights={weights!r}")
    return load_tokenizer(name, f"data.tokenizer={name!r}")


def tokenizer_name(config: RunConfig) -> str:
    """`bytes` or a folder, by the rule above."""
    name, weights = config.data.tokenizer, config.model.weights
    return _tokenizer_of_weights(Path(weights)) if name == "bytes" and weights is not None else name


def held_out_config(config: RunConfig) -> RunConfig:
    """The training whose held-out samples the perplexity of a generation is measured on: the generation's tokenizer,
    and samples no longer than the model has positions."""
    data = config.data.model_copy(update={"tokenizer": tokenizer_name(config)})
    length = min(config.train.sequence_length, config.model.max_position_embeddings)
    update = {"sequence_length": length, "eval_samples": num_perplexity_samples(config)}
    train = config.train.model_copy(update=update)
    return config.model_copy(update={"data": data, "train": train})


def load_tokenizer(name: str, given: str) -> Tokenizer:
    """`bytes`, or that of a folder.

    Args:
        given: what named it, for messages.

    Raises:
        ConfigError: the folder holds none that can be loaded.
    """
    if name == "bytes":
        return Tokenizer(lambda text: [*text.encode()], _decode_bytes, (), 256)
    tokenizer = load_pretrained_tokenizer(name, given)
    num_ids = max(tokenizer.get_vocab().values()) + 1

    def encode(text: str) -> list[int]:
        return [*tokenizer(text, verbose=False)["input_ids"]]

    def decode(tokens: Sequence[int]) -> str:
        known = [token for token in tokens if token < num_ids]
        return str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Tokenizer(encode, decode, () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,), num_ids)


def _decode_bytes(tokens: Sequence[int]) -> str:
    """0xff is in no UTF-8, so it stands for all tokens that are no bytes."""
    return bytes(min(token, 0xFF) for token in tokens).decode(errors="replace")


def _tokenizer_of_weights(place: Path) -> str:
    trained_with = _trained_with(place)
    if trained_with is not None and (trained_with == "bytes" or Path(trained_with).expanduser().is_dir()):
        return trained_with
    folder = _transformers_folder(place)
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        return str(folder)
    return trained_with or "bytes"


def _trained_with(place: Path) -> str | None:
    """`data.tokenizer` of the training that wrote a checkpoint; None for other weights, and for random tokens."""
    if not is_checkpoint(place):
        return None
    saved = read_meta(place).config
    data = (saved.model_extra or {}).get("data")
    is_text = bool(saved.train) and isinstance(data, dict) and data.get("kind") != "synthetic"
    name = data.get("tokenizer") if is_text and isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def _transformers_folder(place: Path) -> Path:
    """With the files that belong to weights, whether or not there are any."""
    return place / CARRIED if is_checkpoint(place) else place


def stop_tokens_of(config: RunConfig, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a sequence: generate.stop_tokens, or those that the folder of the weights names, or the
    tokenizer's; none with generate.ignore_stop.

    Raises:
        ConfigError: the folder's files are damaged.
    """
    settings, weights = config.generate, config.model.weights
    if settings.ignore_stop:
        return []
    if settings.stop_tokens is not None:
        return settings.stop_tokens
    named = None if weights is None else _stop_tokens_of_weights(Path(weights))
    return [*(tokenizer.end_tokens if named is None else named)]


def _stop_tokens_of_weights(place: Path) -> list[int] | None:
    if _trained_with(place) == "bytes":
        return None  # what it carries tells of other tokens
    for name in EOS_FILES:
        file = _transformers_folder(place) / name
        try:
            named = json.loads(file.read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{file} is damaged ({error}); mend it, or give generate.stop_tokens") from None
        if named is not None:
            tokens = named if isinstance(named, list) else [named]
            if not all(type(token) is int for token in tokens):
                raise ConfigError(f"{file} has eos_token_id={named!r}, no token; mend it, or give generate.stop_tokens")
            return tokens
    return None


def prompts_fingerprint(config: RunConfig) -> str:
    """Hash of all that sequences begin and end with.

    Raises:
        ConfigError: as `read_prompts`, and where there is no tokenizer.
    """
    if config.generate.prompt is None and config.generate.prompts_file is None:
        return "random prompts"
    tokenizer = tokenizer_of(config)
    prompts = read_prompts(config.generate, config.model, tokenizer)
    content = [prompt.tokens for prompt in prompts], stop_tokens_of(config, tokenizer)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_prompts(settings: Generate, model: Model, tokenizer: Tokenizer) -> list[Prompt]:
    """All prompts, in order, at least one of which can be generated from.

    Those of generate.prompt, of generate.prompts_file, or random tokens, which depend on generate.seed and the
    prompt's number alone. Empty lines at the end of a file are none.

    Raises:
        ConfigError: both are given; the file can't be read, or is none of prompts; no prompt can be generated from.
    """
    if settings.prompt is not None and settings.prompts_file is not None:
        raise ConfigError(
            f"generate.prompt={_begin(settings.prompt)} and generate.prompts_file={settings.prompts_file!r} are both "
            "given; leave one of them out"
        )
    if settings.prompt is not None:
        source, given = f"generate.prompt={_begin(settings.prompt)}", [_Given(settings.prompt, None)]
        if not _is_text(settings.prompt):
            raise ConfigError(f"{source} is not UTF-8; set the terminal to UTF-8, or use generate.prompts_file")
    elif settings.prompts_file is not None:
        source, given = f"generate.prompts_file={settings.prompts_file!r}", _read_file(settings.prompts_file)
    else:
        source, count = f"generate.prompt_length={settings.prompt_length}", settings.num_requests or settings.batch_size
        given = [_Given(None, random_prompt(settings, model, number)) for number in range(count)]
    prompts = [_prompt(text, tokens, model, tokenizer) for text, tokens in given]
    if all(prompt.problem for prompt in prompts):
        which = "" if len(prompts) == 1 else f"none of the {len(prompts)} prompts can be generated from, the first as "
        raise ConfigError(f"{source}: {which}{prompts[0].problem}")
    return prompts


def random_prompt(settings: Generate, model: Model, number: int) -> list[int]:
    """Tokens of a prompt to measure with."""
    drawn = draw(settings.prompt_length, "prompt", settings.seed, number) % model.vocab_size
    return [int(token) for token in drawn]


class _Given(NamedTuple):
    """A text, or tokens and the text they are of, if any."""

    text: str | None
    tokens: list[int] | None


def _begin(text: str) -> str:
    """Of a text, for messages."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."


def _prompt(text: str | None, tokens: list[int] | None, model: Model, tokenizer: Tokenizer) -> Prompt:
    if tokens is None:
        assert text is not None
        tokens = tokenizer.encode(text) if text else []
    outside = next((token for token in tokens if not 0 <= token < model.vocab_size), None)
    most, problem = model.max_position_embeddings - 1, ""
    if not tokens:
        problem = "the prompt is empty; give it a text, or tokens"
    elif outside is not None:
        problem = (
            f"the prompt has the token {outside}, but model.vocab_size={model.vocab_size}; give tokens that the model "
            "has, or its tokenizer as data.tokenizer=FOLDER"
        )
    elif len(tokens) > most:
        problem = (
            f"the prompt has {len(tokens)} tokens, but model.max_position_embeddings={model.max_position_embeddings} "
            f"has room for {most} and a new one; shorten it"
        )
    return Prompt(text, tokens, problem)


def _read_file(path: str) -> list[_Given]:
    source = f"generate.prompts_file={path!r}"
    if (place := Path(path).expanduser()).exists() and not place.is_file():
        raise ConfigError(f"{source} is no regular file, which can be read twice; give one with a prompt per line")
    try:
        content = place.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{source} can't be read ({error.strerror}); give a file with a prompt per line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    lines = content.rstrip("\n").split("\n")
    if lines == [""]:
        raise ConfigError(f"{source} is empty; give a file with a prompt per line")
    if not path.endswith(".jsonl"):
        return [_Given(line, None) for line in lines]
    return [_read_line(line, f"line {number} of {source}") for number, line in enumerate(lines, start=1)]


def _read_line(line: str, place: str) -> _Given:
    """An object of a .jsonl file; other keys than these two may be anything."""
    with suppress(ValueError, AttributeError, RecursionError):
        entry = json.loads(line)
        text, tokens = entry.get("prompt"), entry.get("prompt_tokens")
        is_known = (text is None or _is_text(text)) and (tokens is None or _is_tokens(tokens))
        if is_known and (text is not None or tokens is not None):
            return _Given(text, tokens)
    raise ConfigError(
        f"{place} is {_begin(line)}, no object with a text as `prompt` or a list of whole numbers as `prompt_tokens`; "
        "make it one"
    )


def _is_text(value: Any) -> bool:
    """Half a pair of surrogates is none, which stands for bytes of the command line that are no UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _num_incomplete(tokens: Sequence[int], tokenizer: Tokenizer) -> int:
    """Tokens at the end that begin a character: 3 at most, of its 4 bytes."""
    counts = range(min(3, len(tokens)) + 1)
    return next((n for n in counts if not tokenizer.decode(tokens[: len(tokens) - n]).endswith(UNKNOWN)), 0)


class TextStream:
    """Text of one sequence, piece by piece, up to the first stop string.

    What a token reads as depends on those before it, and a character may be made of several. So a piece is what the
    tokens since the last one add to the text of those that made the last one, once that text does not end within a
    character. Pieces in a row are `decode` of all tokens, except where a tokenizer takes back what it said: one that
    falls back to bytes, and is given a valid byte in a row with invalid ones.

    What may be the begin of a stop string is held back until it is known. Of several stop strings the one that is
    complete first counts, the longest of those that end together, however the text falls into tokens.

    Args:
        stop_strings: none of them empty.
        after: tokens before the first, a prompt, whose text is not given again, but for a character that it has only
            the beginning of; without them the first token may lose the space before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self.text = ""
        """All pieces so far."""
        self.stopped = False
        """Whether a stop string came: there is no more text."""
        self._decode, self._stop_strings = tokenizer.decode, stop_strings
        end = len(after) - _num_incomplete(after, tokenizer)
        self._last, self._new = [*after[:end]], [*after[end:]]
        self._last_text = tokenizer.decode(self._last)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that a token makes final; often empty."""
        if self.stopped:
            return ""
        self._new.append(token)
        text = self._decode(self._last + self._new)
        if text.endswith(UNKNOWN) or len(text) <= len(self._last_text):
            whole = text.rstrip(UNKNOWN)[len(self._last_text) :]
            stops = any(stop in self._held + whole for stop in self._stop_strings)
            return self._give(whole) if stops else ""
        piece = text[len(self._last_text) :]
        self._last, self._new = self._new, []
        self._last_text = self._decode(self._last)
        return self._give(piece)

    def finish(self) -> str:
        """What was held back; the sequence is at its end."""
        if self.stopped:
            return ""
        rest = self._decode(self._last + self._new)[len(self._last_text) :]
        self._new = []
        return self._give(rest) + self._release(len(self._held))

    def _give(self, piece: str) -> str:
        self._held += piece
        places = [(at + len(stop), at) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if not places:
            return self._release(len(self._held) - self._num_undecided())
        self.stopped = True
        given = self._release(min(places)[1])
        self._held = ""
        return given

    def _num_undecided(self) -> int:
        """Characters at the end of what is held that a stop string may begin with."""
        lengths = (
            size for stop in self._stop_strings for size in range(1, len(stop)) if self._held.endswith(stop[:size])
        )
        return max(lengths, default=0)

    def _release(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given
