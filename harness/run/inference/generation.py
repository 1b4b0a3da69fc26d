"""One rank's whole generation: the stage, the ring and the meter, and one measurement after the other."""

from __future__ import annotations

import torch.distributed as dist

from harness.machine import Machine
from harness.prompts import Tokenizer, read_prompts, stop_tokens_of, tokenizer_of
from harness.record.heartbeat import Heart
from harness.record.inference import InferenceRecord, PhaseRecord
from harness.record.store import Attempt
from harness.run.inference.meter import Meter, Timed
from harness.run.inference.requests import Journal, Requests, arrival_seconds
from harness.run.inference.ring import Ring
from harness.run.inference.stage import Stage
from harness.run.inference.texts import Texts
from harness.run.instruments.heartbeat import HeartbeatObserver
from harness.spec.batching import Batcher, Chosen, Phase
from harness.spec.config import RunConfig
from harness.spec.generation import has_phases
from harness.spec.kv_cache import kv_cache_bytes, limits, longest_sequence, num_groups

WARM_UP_TOKENS = 2
"""Of each sequence of what is no measurement."""


def share_requests(config: RunConfig, rank: int) -> tuple[Requests, Tokenizer | None]:
    """Rank 0 reads the prompts, and tells the others; the tokenizer stays with it."""
    tokenizer: Tokenizer | None = None
    shared: list[Requests | None] = [None]
    if rank == 0:
        tokenizer = tokenizer_of(config)
        prompts = read_prompts(config.generate, config.model, tokenizer)
        shared = [Requests(prompts, stop_tokens_of(config, tokenizer))]
    dist.broadcast_object_list(shared, src=0)
    (requests,) = shared
    assert requests is not None
    return requests, tokenizer


class Generation:
    """Built and called by all ranks at once.

    Random prompts that come all at once are computed in two phases, one after the other, so that each has a throughput
    and a bubble of its own: all prompts, then all further tokens. Given prompts, and requests that come at a rate,
    enter and leave as they do.
    """

    def __init__(
        self, attempt: Attempt, config: RunConfig, rank: int, requests: Requests, machine: Machine, heart: Heart
    ) -> None:
        self._config, self._rank, self._heart = config, rank, heart
        self._prompts = requests.tokens
        self.num_slots = min(config.generate.batch_size, len(self._prompts))
        self.stage = Stage(config, rank, self._prompts, self.num_slots, phase=heart.phase)
        heart.phase("meeting the other stages")
        self.ring = Ring(self.stage, rank, self._prompts, self.num_slots)
        self._number = 0
        self.ring.observers.append(HeartbeatObserver(heart, lambda: self._number, machine.device_kind))
        self.meter = Meter(attempt, config, rank, self.ring, machine)

    @property
    def predicted_cache_bytes(self) -> list[int]:
        """Of one rank of every stage, by the configuration."""
        longest = longest_sequence(self._config, [*map(len, self._prompts)])
        return kv_cache_bytes(self._config, self.num_slots, longest)

    def warm_up(self) -> None:
        """Do everything once, shortly: what is done first takes longer."""
        count = self.num_slots
        lengths = [len(prompt) for prompt in self._prompts[:count]]
        journal = Journal([0.0] * count)
        most = [min(WARM_UP_TOKENS, limit) for limit in limits(self._config, lengths)]
        batcher = self._batcher(lengths, most, journal, None) if self._rank == 0 else None
        self.meter.run(batcher, lambda _: None, step=None)

    def run(self, texts: Texts | None) -> InferenceRecord | None:
        """All requests once; what it took, on rank 0.

        Args:
            texts: on rank 0, where sequences are looked at.
        """
        lengths = [*map(len, self._prompts)]
        journal = Journal(
            arrival_seconds(self._config.generate, len(lengths)), lambda: self._heart.phase("waiting for requests")
        )
        batcher = None
        if self._rank == 0:
            batcher = self._batcher(lengths, limits(self._config, lengths), journal, texts)

        def told(chosen: list[Chosen]) -> None:
            journal.told(chosen, self.ring.waited_seconds)
            if texts is not None:
                texts.told(chosen, journal.age)

        self.ring.began = journal.began
        self._number += 1
        tracking = self._config.tracking
        kept = self._number <= tracking.span_steps or self._number in tracking.trace_steps
        step = self._number if kept else None
        if not has_phases(self._config):
            timed = self.meter.run(batcher, told, step)
            return None if timed is None else journal.record(self._number, timed.peak_memory_bytes, None, None)
        phases: list[Timed | None] = []
        for phase in ("prefill", "decode"):
            if batcher is not None:
                batcher.phases = frozenset[Phase]([phase])
            phases.append(self.meter.run(batcher, told, step, phase))
        prefill, decode = phases
        if prefill is None or decode is None:
            return None
        chosen = sum(map(len, journal.tokens)) - len(lengths)
        return journal.record(
            self._number,
            decode.peak_memory_bytes,
            PhaseRecord(prefill.seconds, sum(lengths), prefill.bubbles),
            PhaseRecord(decode.seconds, chosen, decode.bubbles) if chosen else None,
        )

    def _batcher(self, lengths: list[int], most: list[int], journal: Journal, texts: Texts | None) -> Batcher:
        settings = self._config.generate
        return Batcher(
            lengths,
            most,
            self.num_slots,
            num_groups(self._config, self.num_slots),
            settings.prefill_chunk,
            settings.prefill_batch_size,
            ends=texts.ends if texts is not None else lambda *_: None,
            arrivals=journal.arrive,
            first=self.ring.num_passes,
        )
