"""What stages send each other, as it leaves and arrives by itself while they compute.

Nobody waits to send: a tensor lives until its receiver is known to have it. Receives are posted ahead, one on each
lane, in the order in which the sender sends; what arrives before it is asked for is kept. So no order of passes that
is possible at all makes stages wait for each other's transfers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harness.model.groups import create_groups
from harness.spans.span import RECEIVE_OF_SEND, SEND_OF_RECEIVE
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule
from harness.spec.topology import Topology

TRAINED = ("send_activation", "send_gradient")
"""What stages send each other in training."""


class Lane(NamedTuple):
    """Messages of one kind over one boundary between two parts of the model, all in one direction."""

    kind: str
    """Of the send."""
    boundary: int
    """The part before it."""


def lane_of(instruction: Instruction, placement: Placement, stage: int) -> Lane:
    """The lane of a send or a receive of a stage."""
    part = placement.part(stage, instruction.chunk)
    kind = SEND_OF_RECEIVE.get(instruction.kind, instruction.kind)
    after_part = instruction.kind in ("send_activation", "recv_gradient")
    return Lane(kind, part if after_part else part - 1)


def tags(placement: Placement) -> dict[Lane, int]:
    """Small numbers that differ between all lanes that connect the same two stages: 2 v with p > 2 in a loop."""
    found: dict[Lane, int] = {}
    taken = Counter[frozenset[int]]()
    for boundary in range(placement.num_parts - 1):
        stages = frozenset({placement.stage_of(boundary), placement.stage_of(boundary + 1)})
        if len(stages) > 1:
            for kind in TRAINED:
                found[Lane(kind, boundary)] = taken[stages]
                taken[stages] += 1
    return found


class Messages:
    """What one stage sends and receives in a schedule, and what it knows of the others.

    Args:
        stage: whose messages they are.
    """

    def __init__(self, schedule: Schedule, stage: int) -> None:
        own = schedule.stages[stage]
        self.incoming: dict[Lane, list[int]] = {}
        """Micro-batches, in the order of their sends."""
        self.sender: dict[Lane, int] = {}
        self.taken_before: dict[tuple[Lane, int], Counter[Lane]] = {}
        """Of an incoming message: how many of ours its sender had taken before it was sent."""
        for peer in sorted({instruction.peer for instruction in own} - {-1}):
            taken = Counter[Lane]()
            for instruction in schedule.stages[peer]:
                if instruction.peer != stage:
                    continue
                lane = lane_of(instruction, schedule.placement, peer)
                if instruction.kind in RECEIVE_OF_SEND:
                    self.incoming.setdefault(lane, []).append(instruction.micro_batch)
                    self.sender[lane] = peer
                    self.taken_before[lane, instruction.micro_batch] = taken.copy()
                else:
                    taken[lane] += 1


class Channels:
    """The ways between the stages of this rank's pipeline.

    On CPU the lanes between two stages differ in their tag. NCCL has no tags, and what two ranks send each other in
    one group waits for what they sent before: there each tag is a group, which has a communicator for each two ranks.

    Args:
        shape: of what passes between parts, [batch, slice, hidden].
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        placement: Placement,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.placement, self.stage = placement, topology.coordinate(rank).pp
        self._pipeline = next(ranks for ranks in topology.pipelines() if rank in ranks)
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._tags = tags(placement)
        self.groups: list[dist.ProcessGroup] = []
        if self._tags:
            number = max(self._tags.values()) + 1 if device.type == "cuda" else 1
            self.groups = [create_groups(topology.pipelines(), rank) for _ in range(number)]

    def send(self, tensor: Tensor, lane: Lane, stage: int) -> dist.Work:
        """Begin to send a contiguous tensor, which must stay as it is until the work is done."""
        work = dist.isend(tensor, self._pipeline[stage], group=self._group(lane), tag=self._tags[lane])
        assert work is not None
        return work

    def receive(self, lane: Lane, stage: int) -> tuple[dist.Work, Tensor]:
        """Begin to receive."""
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(tensor, self._pipeline[stage], group=self._group(lane), tag=self._tags[lane])
        assert work is not None
        return work, tensor

    def _group(self, lane: Lane) -> dist.ProcessGroup:
        return self.groups[self._tags[lane] % len(self.groups)]


class Transfers:
    """The transfers of one stage, schedule after schedule."""

    def __init__(self, channels: Channels, schedule: Schedule) -> None:
        self._channels = channels
        self._messages = Messages(schedule, channels.stage)
        self._expected: dict[Lane, Iterator[int]] = {}
        self._posted: dict[Lane, tuple[int, dist.Work, Tensor] | None] = {}
        self._early: dict[tuple[Lane, int], Tensor] = {}
        self._sent: dict[Lane, deque[tuple[dist.Work, Tensor]]] = {}
        self._num_released = Counter[Lane]()

    def begin(self) -> None:
        """Expect the messages of a schedule; the first transfer of this stage posts the first receive of each lane."""
        self._expected = {lane: iter(numbers) for lane, numbers in self._messages.incoming.items()}
        self._num_released.clear()
        self._posted.clear()

    def _open(self) -> None:
        if not self._posted:
            for lane in self._expected:
                self._post(lane)

    def _post(self, lane: Lane) -> None:
        number = next(self._expected[lane], None)
        message = None if number is None else self._channels.receive(lane, self._messages.sender[lane])
        self._posted[lane] = None if number is None or message is None else (number, *message)

    def send(self, instruction: Instruction, tensor: Tensor) -> None:
        """Send a tensor, which nobody may change until its receiver has it."""
        self._open()
        lane = lane_of(instruction, self._channels.placement, self._channels.stage)
        tensor = tensor.contiguous()
        work = self._channels.send(tensor, lane, instruction.peer)
        self._sent.setdefault(lane, deque()).append((work, tensor))

    def receive(self, instruction: Instruction) -> Tensor:
        """Wait for a message, in memory of its own."""
        self._open()
        lane = lane_of(instruction, self._channels.placement, self._channels.stage)
        wanted = lane, instruction.micro_batch
        while wanted not in self._early:
            posted = self._posted[lane]
            assert posted is not None, f"{instruction} is not expected"
            number, work, tensor = posted
            work.wait()
            self._early[lane, number] = tensor
            self._release(self._messages.taken_before[lane, number])
            self._post(lane)
        return self._early.pop(wanted)

    def _release(self, taken: Counter[Lane]) -> None:
        """Forget what its receiver has."""
        for lane, number in taken.items():
            while self._num_released[lane] < number:
                self._num_released[lane] += 1
                self._sent[lane].popleft()[0].wait()

    def end(self) -> None:
        """Wait until all that was sent has left."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()
