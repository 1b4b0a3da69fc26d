"""What rank 0 says of sequences while they come: text of the only one as it comes, a line of each that has ended.

<attempt>/generated.jsonl    a line per sequence, in the order they ended: `Line`
<attempt>/stream.txt         text of the only sequence, as far as it has come
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.prompts import TextStream, Tokenizer
from harness.record.store import Attempt
from harness.run.inference.requests import Requests
from harness.spec.batching import Chosen
from harness.spec.config import Generate
from harness.strict_json import dumps


class Texts:
    """Follows sequences to their ends.

    Args:
        requests: with all prompts that were given, also those that nothing can be generated from.
    """

    def __init__(self, attempt: Attempt, settings: Generate, requests: Requests, tokenizer: Tokenizer) -> None:
        prompts, numbers = requests.prompts, requests.numbers
        self._prompts, self._numbers, self._stop_tokens = prompts, numbers, frozenset(requests.stop_tokens)
        stops = [] if settings.ignore_stop else settings.stop_strings
        self._streams = [TextStream(tokenizer, stops, prompts[number].tokens) for number in numbers]
        self._tokens: list[list[int]] = [[] for _ in numbers]
        self._lines = attempt.generated_file.open("w", encoding="utf-8")
        self._stream = attempt.stream_file.open("w", encoding="utf-8") if len(prompts) == 1 else None
        for number, prompt in enumerate(prompts):
            if prompt.problem:
                self._write(number, [], "", f"error: {prompt.problem}", 0.0)

    def ends(self, request: int, token: int) -> str | None:
        """Take a token; `stop` where it ends its sequence."""
        self._tokens[request].append(token)
        if token in self._stop_tokens:
            return "stop"
        self._show(self._streams[request].push(token))
        return "stop" if self._streams[request].stopped else None

    def told(self, chosen: Sequence[Chosen], age: Callable[[int], float]) -> None:
        """Write the lines of sequences that have ended.

        Args:
            age: seconds since a request came.
        """
        for request, _, reason in chosen:
            if reason is not None:
                stream = self._streams[request]
                self._show(stream.finish())
                self._write(self._numbers[request], self._tokens[request], stream.text, reason, age(request))

    def _show(self, piece: str) -> None:
        if self._stream is not None and piece:
            self._stream.write(piece)
            self._stream.flush()

    def _write(self, number: int, tokens: Sequence[int], text: str, reason: str, seconds: float) -> None:
        prompt = self._prompts[number]
        line: dict[str, Any] = {
            "prompt": prompt.prompt,
            "prompt_tokens": prompt.tokens,
            "tokens": tokens,
            "text": text,
            "finish_reason": reason,
            "seconds": seconds,
            "number": number,
        }
        self._lines.write(dumps(line) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        if self._stream is not None:
            self._stream.close()
