"""The ring as ranks execute it: instructions of `harness.spec.ring`, one by one as rank 0 decides what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.run.engines.engine import Observers
from harness.run.inference.messages import Messages
from harness.run.inference.stage import Stage
from harness.run.shared_memory import describe_transports
from harness.spec.batching import Chosen, Feed, Work
from harness.spec.ring import first_stage, later_stage
from harness.spec.schedules import Instruction


class Ring:
    """One rank of it. Built by all ranks at once.

    Args:
        prompts: tokens of each request.
        most_rows: of a pass.
    """

    def __init__(self, stage: Stage, rank: int, prompts: Sequence[Sequence[int]], most_rows: int) -> None:
        self.stage, self.rank, self.observers = stage, rank, Observers()
        self.topology, self.tp = stage.topology, stage.tp
        self.messages = Messages(
            stage.topology, rank, stage.tp.group, most_rows, stage.config.model.hidden_size, stage.dtype, stage.device
        )
        self._prompts = prompts
        self.began: Callable[[Work], None] = lambda _: None
        """Told of passes that begin, on rank 0."""
        self.executed: list[Instruction] = []
        """Since `run` began."""
        self._functions: dict[str, Callable[[Instruction], Any]] = {
            "recv_activation": self._receive_activation,
            "forward": self._forward,
            "send_activation": self._send_activation,
            "send_tokens": self._send_tokens,
            "recv_tokens": self._receive_tokens,
        }
        self._last_tokens: dict[int, int] = {}
        """Of each request, on rank 0: what its next pass goes on from."""
        self._under_way: dict[int, Work] = {}
        """Whose tokens have not come back, on rank 0."""
        self._random: Tensor | None = None
        self.clock: Callable[[], int] = time.monotonic_ns
        """Of rank 0, on any rank: nanoseconds."""
        self.waited_seconds = 0.0
        """Of tokens that are told, since they were chosen."""
        self.num_passes = 0
        """That have begun, in all runs: the number of the next."""
        self._chosen: list[int] = []
        """Requests that got a token in the last pass, on the last stage."""

    def run(self, feed: Feed | None, told: Callable[[list[Chosen]], None]) -> None:
        """Let a feed go round until it has no turn left. Collective.

        Args:
            feed: on rank 0.
            told: of the tokens that came back, on rank 0.
        """
        self._feed, self._told = feed, told
        self.executed, self._ended = [], False
        for instruction in self._instructions():
            self.observers.execute(instruction, partial(self._functions[instruction.kind], instruction))
            if self._ended:
                break
            self.executed.append(instruction)
        if self.rank == 0:
            self.messages.tell_neighbours(None, [])
        if not self.stage.is_last:
            self.messages.send(None, None)
        self.messages.finish()

    @property
    def transport(self) -> str:
        """What carries messages, as `harness.run.shared_memory` says; empty for one rank."""
        tp = None if self.tp.group is None else self.tp.group.process_group
        return describe_transports({"tp": tp, "pp": self.messages.hidden_group})

    def destroy(self) -> None:
        """Free the process groups of ring and stage. Collective."""
        own = [group.process_group for group in (self.tp.group, self.tp.kv_group) if group is not None]
        for group in dict.fromkeys([*self.messages.groups, *own]):  # in one order on all ranks
            dist.destroy_process_group(group)

    def _instructions(self) -> Iterator[Instruction]:
        if self.rank == 0:
            return self._leading()
        if self.stage.is_first:
            return self._following()
        return later_stage(self.stage.index, self.topology.pp, self._numbers(), iter(lambda: bool(self._chosen), None))

    def _leading(self) -> Iterator[Instruction]:
        """Rank 0."""
        assert self._feed is not None
        for step in first_stage(self._feed, self.topology.pp):
            if isinstance(step, Instruction):
                yield step
                continue
            tokens = [self._last_tokens[row.request] for row in step.rows] if step.phase == "decode" else []
            self.messages.tell_neighbours(step, tokens)
            self._take_up(step, tokens)
            self.num_passes = step.number + 1
            self.began(step)
            if step.choosing:
                self._under_way[step.number] = step

    def _following(self) -> Iterator[Instruction]:
        """The other ranks of the first stage do as rank 0 says."""
        for number in self._numbers():
            yield Instruction("recv_tokens", number)
            yield Instruction("forward", number)
            if self.topology.pp > 1:
                yield Instruction("send_activation", number, peer=1)

    def _numbers(self) -> Iterator[int]:
        """Of the passes that come: counted on where the last run ended."""
        while True:
            yield self.num_passes
            self.num_passes += 1

    # --- instructions

    def _take_up(self, work: Work, tokens: Sequence[int]) -> None:
        """First stage: the tokens that a pass computes, [rows, length]; behind a row's end there is padding."""
        if self.stage.takes_hidden:
            self._work, self._inputs = work, self._random_hidden(work)
            return
        if work.phase == "decode":
            inputs = torch.tensor(tokens).unsqueeze(1)
        else:
            inputs = torch.zeros(len(work.rows), work.length, dtype=torch.int64)
            for i, row in enumerate(work.rows):
                inputs[i, : row.end - row.start] = torch.tensor(self._prompts[row.request][row.start : row.end])
        self._work, self._inputs = work, inputs.to(self.stage.device)

    def _random_hidden(self, work: Work) -> Tensor:
        """What a layer alone computes: [rows, length, hidden], the same in every pass of the shape."""
        shape = len(work.rows), work.length, self.stage.config.model.hidden_size
        if self._random is None or self._random.shape != shape:
            self._random = draw_hidden(shape).to(self.stage.device, self.stage.dtype)
        return self._random

    def _receive_tokens(self, instruction: Instruction) -> None:
        if self.rank != 0:
            heard = self.messages.hear_leader()
            self._ended = heard is None
            if heard is not None:
                self._take_up(*heard)
            return
        work = self._under_way.pop(instruction.micro_batch)
        moment_ns, tokens = self.messages.receive_tokens(len(work.choosing))
        self.waited_seconds = max(0.0, (time.monotonic_ns() - moment_ns) / 1e9)
        self._deliver(work, tokens)

    def _receive_activation(self, _: Instruction) -> None:
        received = self.messages.receive()
        self._ended = received is None
        if received is not None:
            self._work, self._inputs = received

    def _forward(self, _: Instruction) -> None:
        outputs = self.stage.run(self._work, self._inputs)
        if not self.stage.is_last:
            self._hidden = outputs
            return
        self._chosen = [row.request for row in self._work.choosing]
        self._tokens = outputs
        if self.rank == 0 and self._work.choosing:
            self._deliver(self._under_way.pop(self._work.number), outputs.tolist())

    def _send_activation(self, _: Instruction) -> None:
        self.messages.send(self._work, self._hidden)

    def _send_tokens(self, _: Instruction) -> None:
        if self.tp.rank == 0:
            self.messages.send_tokens(self._tokens, self.clock())

    def _deliver(self, work: Work, tokens: Sequence[int]) -> None:
        assert self._feed is not None
        chosen = self._feed.deliver(work, tokens)
        for request, token, reason in chosen:
            if reason is None:
                self._last_tokens[request] = token
            else:
                self._last_tokens.pop(request, None)
        self._told(chosen)


def draw_hidden(shape: tuple[int, ...]) -> Tensor:
    """Random hidden states in fp32 on the CPU, a function of their shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
