"""Tokens of the training text, prepared once by the parent process, and the draws that choose from them.

Text is tokenized into a cache that ranks map into memory: `$XDG_CACHE_HOME/shardwright/tokens/KEY.npy`, with
`KEY.json` and where its documents begin, `KEY.documents.npy`, beside it. KEY is a hash of the text and the tokenizer,
so a moved file finds its tokens, a changed one is tokenized again, and an entry whose tokens don't match their recorded
hash is made anew.

A draw is a pure function of (seed, step, number in the global batch): no layout, micro-batch size or number of ranks
changes what is trained on. `harness.run.data` makes samples of them.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import ConfigError
from harness.machine import cache_folder
from harness.spec.config import Data
from harness.strict_json import dumps

PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenized in pieces: a tokenizer needs a hundred bytes of memory per character."""


@dataclass(frozen=True)
class Corpus:
    """Prepared tokens: what ranks need to draw samples, and what a record needs to name the data."""

    path: Path | None
    """Token file for `load_tokens`; None: random tokens."""
    num_tokens: int
    """0 for random tokens."""
    dtype: str
    """Of the token file."""
    fingerprint: str
    """Hash of the tokens, whatever file they came from."""
    description: str
    """Source, hash of the text and tokenizer."""
    documents: Path | None = None
    """File for `load_tokens`: where each document that is not empty begins and ends in the token file, and its number
    among all of the text: `[num_documents, 3]`."""
    end: tuple[int, ...] = ()
    """Tokens that a document ends with besides."""
    num_ids: int = 0
    """Tokens are below this number."""
    mask_token: int | None = None
    """What stands for a token that is masked."""
    special_tokens: tuple[int, ...] = ()
    """Those of no text, which are never masked."""
    source: str = ""
    """What the text is, in short."""

    def ranges(self, sequence_length: int) -> tuple[range, range]:
        """Positions of the training tokens, and of the held-out ones at the end.

        The held-out part is 5 % of the tokens and at least one sample; it is empty when that would leave no
        sample to train on.
        """
        held_out = max(self.num_tokens // 20, sequence_length + 1)
        if self.num_tokens - held_out <= sequence_length:
            held_out = 0
        boundary = self.num_tokens - held_out
        return range(boundary), range(boundary, self.num_tokens)


def prepare_corpus(data: Data, vocab_size: int, sequence_length: int, objective: str = "causal") -> Corpus:
    """Tokens of `data`, from the cache when it has them.

    Raises:
        ConfigError: no such text or tokenizer, too small a vocabulary, too short a text or too long a document, no
            token to mask others with, no room for the cache.
    """
    if data.kind == "synthetic":
        corpus = _random_tokens(vocab_size, objective)
        fingerprint = _fingerprint(corpus, data.documents, objective)
        return replace(corpus, fingerprint=fingerprint, source=corpus.description)
    text = _hub_text(data) if data.kind == "hub" else _local_text(data.path)
    content = hashlib.sha256()
    for document in text.documents():
        content.update(f"{len(document)} {document}".encode())
    path, entry = _tokenize_once(text, content.hexdigest(), data.tokenizer, vocab_size)
    description = f"{text.source}, sha256 {content.hexdigest()}, tokenizer {data.tokenizer}"
    corpus = Corpus(
        path,
        entry["num_tokens"],
        entry["dtype"],
        entry["sha256"],
        description,
        _documents_file(path),
        tuple(entry["end"]),
        entry["num_ids"],
        entry["mask_token"],
        tuple(entry["special_tokens"]),
        text.source,
    )
    if data.documents == "cut":
        _check_windows(corpus, text, sequence_length)
    else:
        _check_documents(corpus, text, data.documents, sequence_length, tokens_besides(objective))
    if objective == "masked":
        _check_mask(corpus, data.tokenizer, vocab_size)
    return replace(corpus, fingerprint=_fingerprint(corpus, data.documents, objective))


def tokens_besides(objective: str) -> int:
    """Tokens that a document has more than a sample has positions for them: the last one is only predicted."""
    return 1 if objective == "causal" else 0


def _random_tokens(vocab_size: int, objective: str) -> Corpus:
    digest = hashlib.sha256(f"synthetic {vocab_size}".encode()).hexdigest()
    if objective != "masked":
        return Corpus(None, 0, "int64", digest, f"random tokens below {vocab_size}", num_ids=vocab_size)
    if vocab_size < 2:
        raise ConfigError(
            f"model.vocab_size={vocab_size} has no room for a mask token beside another; use model.vocab_size=2 or more"
        )
    last = vocab_size - 1
    return Corpus(None, 0, "int64", digest, f"random tokens below {last}", num_ids=last, mask_token=last)


def _fingerprint(corpus: Corpus, documents: str, objective: str) -> str:
    """Hash of all that samples depend on; of cut texts of which the next token is predicted, of the tokens alone."""
    besides = ""
    if documents != "cut":
        offsets = "" if corpus.documents is None else hashlib.sha256(load_tokens(corpus.documents).data).hexdigest()
        besides += f" {documents} {offsets} {corpus.end}"
    if objective == "masked":
        besides += f" masked {corpus.num_ids} {corpus.mask_token} {corpus.special_tokens}"
    return hashlib.sha256((corpus.fingerprint + besides).encode()).hexdigest() if besides else corpus.fingerprint


def _check_windows(corpus: Corpus, text: _Text, sequence_length: int) -> None:
    if corpus.num_tokens <= sequence_length:
        raise ConfigError(
            f"{text.source} has {corpus.num_tokens} tokens, fewer than the {sequence_length + 1} of one sample at "
            f"train.sequence_length={sequence_length}; give a longer text or shorten train.sequence_length"
        )


def _check_documents(corpus: Corpus, text: _Text, documents: str, sequence_length: int, besides: int) -> None:
    lengths = document_lengths(corpus)
    if not len(lengths) or lengths.max() <= besides:
        raise ConfigError(
            f"{text.source} has no document of {besides + 1} tokens or more; give another text, or use "
            "data.documents=cut"
        )
    longest = int(lengths.argmax())
    if lengths[longest] - besides > sequence_length:
        assert corpus.documents is not None
        name = text.name(int(load_tokens(corpus.documents)[longest][2]))
        raise ConfigError(
            f"{name} has {lengths[longest]} tokens, but with data.documents={documents} a document has "
            f"{sequence_length + besides} at most at train.sequence_length={sequence_length}; raise that, up to "
            "model.max_position_embeddings, split the document, or use data.documents=cut"
        )


def document_lengths(corpus: Corpus) -> npt.NDArray[np.int64]:
    """Tokens of each document, its end included: `[num_documents]`."""
    assert corpus.documents is not None
    begins, ends, _ = load_tokens(corpus.documents).T
    lengths: npt.NDArray[np.int64] = ends - begins + len(corpus.end)
    return lengths


def _check_mask(corpus: Corpus, tokenizer_name: str, vocab_size: int) -> None:
    if corpus.mask_token is None:
        raise ConfigError(
            f"train.objective=masked needs a tokenizer with a mask token, which that of data.tokenizer="
            f"{tokenizer_name!r} has not; use another, or `bytes`"
        )
    if corpus.mask_token >= vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} has no room for the mask token {corpus.mask_token} of data.tokenizer="
            f"{tokenizer_name}; use model.vocab_size={corpus.mask_token + 1} or more"
        )


def load_tokens(path: Path) -> npt.NDArray[Any]:
    """Map a token file into memory: `[num_tokens]` of uint16 or uint32, read-only."""
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def sample_start(seed: int, step: int, number: int, num_positions: int) -> int:
    """Which of `num_positions` places a sample is taken from, uniform over them.

    Args:
        number: of the sample in the global batch.
    """
    return int(draw(1, seed, step, number)[0] % num_positions)


def draw(count: int, *key: object) -> npt.NDArray[np.uint64]:
    """`[count]` random numbers of 64 bits: a hash of `key`, so that no generator's state or version matters."""
    digest = hashlib.shake_128(",".join(map(str, key)).encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8")


class _Text(NamedTuple):
    """Documents, read anew at each call, and how to name them."""

    source: str
    documents: Callable[[], Iterable[str]]
    name: Callable[[int], str]
    """Of a document by its number."""


def _local_text(path: str | None) -> _Text:
    """The text of a file, the files below a folder or those of a glob; by default CPython's documentation."""
    if path is None:
        from pydoc_data.topics import topics

        names = sorted(topics)
        source = f"pydoc_data.topics of CPython {platform.python_version()}"
        return _Text(source, lambda: [topics[key] for key in names], lambda number: f"{names[number]!r} of {source}")
    files = _files(path)
    return _Text(f"data.path={path!r}", lambda: map(_read_text, files), lambda number: str(files[number]))


def _files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if not path:
        raise ConfigError("data.path='' is empty; give a file, a folder or a glob, or null for the default text")
    if place.is_dir():  # without hidden files: .git, .DS_Store
        below = [file for file in place.rglob("*") if file.is_file()]
        files = [f for f in below if not any(part.startswith(".") for part in f.relative_to(place).parts)]
    elif place.exists():
        files = [place]
    elif glob.has_magic(path):
        matches = map(Path, glob.glob(str(place), recursive=True))  # noqa: PTH207 (Path.glob takes relative patterns)
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ConfigError(f"data.path={path!r} matches no file; correct the pattern")
    else:
        raise ConfigError(f"data.path={path!r} does not exist; give a file, a folder or a glob of text files")
    return sorted(files)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}); remove it from data.path or mend it") from None


def _read_text(file: Path) -> str:
    content = _read(file)
    try:
        if b"\0" not in content:
            return content.decode()
    except UnicodeDecodeError:
        pass
    raise ConfigError(f"{file} is not UTF-8 text, it begins with {content[:16]!r}; remove it from data.path")


def _hub_text(data: Data) -> _Text:
    """A column of a dataset on the Hugging Face Hub."""
    if not data.path:
        raise ConfigError(
            "data.kind=hub needs data.path, the name of a dataset, such as data.path=roneneldan/TinyStories"
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError("data.kind=hub needs a package that is not installed; run `pip install datasets`") from None
    try:
        column = datasets.load_dataset(data.path, split=data.hub_split)[data.hub_column]
    except Exception as error:  # anything: network, names, formats
        raise ConfigError(
            f"data.path={data.path!r} with data.hub_split={data.hub_split!r} and data.hub_column={data.hub_column!r} "
            f"can't be loaded ({_first_line(error)}); correct them, or use data.kind=text"
        ) from error
    source = f"{data.path} ({data.hub_split}, {data.hub_column})"
    return _Text(source, lambda: map(str, column), lambda number: f"row {number} of {source}")


class _Tokenizer(NamedTuple):
    num_ids: int
    separator: list[int]
    """Between two documents."""
    encode: Callable[[str], Any]
    begin: Sequence[int] = ()
    """Of each document."""
    mask_token: int | None = None
    special_tokens: Sequence[int] = ()


def _load_tokenizer(name: str) -> _Tokenizer:
    if name == "bytes":
        return _Tokenizer(256, list(b"\n\n"), lambda text: np.frombuffer(text.encode(), np.uint8), mask_token=256)
    tokenizer = load_pretrained_tokenizer(name, f"data.tokenizer={name!r}")

    def encode(text: str) -> Any:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    return _Tokenizer(
        max(tokenizer.get_vocab().values()) + 1,
        ends[:1] or encode("\n\n"),
        encode,
        [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id],
        tokenizer.mask_token_id,
        sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}),
    )


def load_pretrained_tokenizer(folder: str, given: str) -> Any:
    """The tokenizer of `transformers` in a folder.

    Args:
        given: what named the folder, for messages.

    Raises:
        ConfigError: there is none that can be loaded.
    """
    try:
        auto_tokenizer = importlib.import_module("transformers").AutoTokenizer  # takes seconds
        return auto_tokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything: each kind of tokenizer fails in its own way
        raise ConfigError(
            f"{given} holds no tokenizer that transformers can load ({_first_line(error)}); "
            "give a folder written by a tokenizer's save_pretrained, or `bytes`"
        ) from error


def _tokenizer_identity(name: str) -> str:
    """Hash of what decides a text's tokens: the files of the tokenizer, weights and the like left out."""
    if name == "bytes":
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.tokenizer={name!r} is no folder; give one with a transformers tokenizer, or `bytes`")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".model", ".txt", ".tiktoken", ".vocab"}:
            digest.update(f"{file.name} {hashlib.sha256(_read(file)).hexdigest()}\n".encode())
    return digest.hexdigest()


def _tokenize_once(text: _Text, content: str, tokenizer_name: str, vocab_size: int) -> tuple[Path, dict[str, Any]]:
    """The cached tokens of a text and what is recorded about them."""
    key = hashlib.sha256(f"2 {content} {_tokenizer_identity(tokenizer_name)}".encode()).hexdigest()
    folder = cache_folder("tokens")
    path = folder / f"{key[:32]}.npy"
    if entry := _cached(path):
        _check_vocabulary(entry["num_ids"], tokenizer_name, vocab_size)
        return path, entry
    tokenizer = _load_tokenizer(tokenizer_name)
    _check_vocabulary(tokenizer.num_ids, tokenizer_name, vocab_size)
    tokens, documents = _tokenize(text, tokenizer)
    entry = {
        "num_ids": tokenizer.num_ids,
        "mask_token": tokenizer.mask_token,
        "special_tokens": list(tokenizer.special_tokens),
        "end": [int(token) for token in tokenizer.separator],
        "num_tokens": len(tokens),
        "dtype": str(tokens.dtype),
        "sha256": hashlib.sha256(tokens.data).hexdigest(),
        "documents_sha256": hashlib.sha256(documents.data).hexdigest(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, lambda file: np.save(file, tokens))
        _write(_documents_file(path), lambda file: np.save(file, documents))
        _write(path.with_suffix(".json"), lambda file: file.write(dumps(entry).encode()))
    except OSError as error:
        raise ConfigError(
            f"the token cache {folder} can't be written ({error.strerror}); "
            "make room there, or set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return path, entry


def _check_vocabulary(num_ids: int, tokenizer_name: str, vocab_size: int) -> None:
    if vocab_size < num_ids:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the {num_ids} ids of the tokenizer "
            f"(data.tokenizer={tokenizer_name}); use model.vocab_size={num_ids} or more"
        )


def _cached(path: Path) -> dict[str, Any] | None:
    """The record of a cache entry; None where it is missing or damaged."""
    try:
        entry: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        tokens = load_tokens(path)
        documents = load_tokens(_documents_file(path))
        shape = (tokens.shape, str(tokens.dtype))
        intact = shape == ((entry["num_tokens"],), entry["dtype"]) and isinstance(entry["num_ids"], int)
        intact = intact and {"mask_token", "special_tokens", "end"} <= entry.keys() and documents.dtype == np.int64
        digests = [hashlib.sha256(array.data).hexdigest() for array in (tokens, documents)]
        return entry if intact and digests == [entry["sha256"], entry["documents_sha256"]] else None
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None


def _documents_file(path: Path) -> Path:
    """Beside a token file."""
    return path.with_suffix(".documents.npy")


def _tokenize(text: _Text, tokenizer: _Tokenizer) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """All tokens, separators between documents, and `Corpus.documents`."""
    dtype = np.uint16 if tokenizer.num_ids <= 1 << 16 else np.uint32
    parts, places, num_tokens = [np.empty(0, dtype)], list[tuple[int, int, int]](), 0

    def add(tokens: Any) -> None:
        nonlocal num_tokens
        parts.append(np.asarray(tokens, dtype))
        num_tokens += len(parts[-1])

    for number, document in enumerate(text.documents()):
        if number:
            add(tokenizer.separator)
        begin = num_tokens
        add(tokenizer.begin)
        for start in range(0, len(document), PIECE_CHARACTERS):
            add(tokenizer.encode(document[start : start + PIECE_CHARACTERS]))
        if num_tokens > begin + len(tokenizer.begin):
            places.append((begin, num_tokens, number))
    return np.concatenate(parts), np.array(places, np.int64).reshape(-1, 3)


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Whole or not at all, whoever else is writing the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
