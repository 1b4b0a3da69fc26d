"""What stages of a ring tell each other: which pass comes, its hidden states, and the tokens that were chosen.

What passes is decided on rank 0. It tells its tensor-parallel neighbours, and every rank of a stage tells the one of
its place in the next stage, just before the hidden states. Nobody waits to send. Descriptions and tokens travel between
CPUs, also where hidden states travel between GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from harness.model.groups import Group, create_groups
from harness.spec.batching import Phase, Row, Work
from harness.spec.topology import Topology

PHASES: tuple[Phase, ...] = ("prefill", "decode")
END = -1
"""In the place of a pass's number: there is none, and no more will come."""
DESCRIPTION, HIDDEN, TOKENS = range(3)
"""Tags."""


def encode(work: Work | None, tokens: Sequence[int], most_rows: int) -> Tensor:
    """A pass as integers, [3 + 6 most_rows].

    Args:
        tokens: those that its rows go on from; of prompts none.
    """
    numbers = [END, 0, 0]
    if work is not None:
        numbers = [work.number, PHASES.index(work.phase), len(work.rows)]
        for row, token in zip(work.rows, tokens or [0] * len(work.rows), strict=True):
            numbers += (*row, token)
    return torch.tensor(numbers + [0] * (3 + 6 * most_rows - len(numbers)))


def decode(coded: Tensor) -> tuple[Work, list[int]] | None:
    """The inverse of `encode`; None at the end."""
    number, phase, num_rows, *rest = coded.tolist()
    if number == END:
        return None
    fields = [rest[6 * i : 6 * i + 6] for i in range(num_rows)]
    rows = tuple(Row(slot, request, start, end, bool(chooses)) for slot, request, start, end, chooses, _ in fields)
    return Work(number, PHASES[phase], rows), [field[-1] for field in fields]


class Messages:
    """The ways of one rank. Built by all ranks at once.

    Args:
        most_rows: of a pass.
        hidden_size: of what passes between stages, in type and on device as given.
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        tp: Group | None,
        most_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        place = topology.coordinate(rank)
        self._rank, self._most_rows = rank, most_rows
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._pipeline = next(ranks for ranks in topology.pipelines() if rank in ranks)
        self._stage, self._is_leader = place.pp, rank == 0
        self._neighbours = next(ranks for ranks in topology.groups("tp") if rank in ranks)
        self.hidden_group: dist.ProcessGroup | None = None
        """That hidden states travel in."""
        self._control: dist.ProcessGroup | None = None
        self._tp: dist.ProcessGroup | None = None
        if topology.pp > 1:
            self.hidden_group = create_groups(topology.pipelines(), rank)
            on_gpu = device.type == "cuda"
            self._control = create_groups(topology.pipelines(), rank, "gloo") if on_gpu else self.hidden_group
        self._own_tp = None
        if tp is not None:
            if device.type == "cuda":
                self._own_tp = create_groups(topology.groups("tp"), rank, "gloo")
            self._tp = self._own_tp or tp.process_group
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those that were made here."""
        return [group for group in dict.fromkeys((self.hidden_group, self._control, self._own_tp)) if group]

    def tell_neighbours(self, work: Work | None, tokens: Sequence[int]) -> None:
        """Rank 0: tell the ranks that share the first stage what comes."""
        if self._tp is not None:
            dist.broadcast(encode(work, tokens, self._most_rows), src=0, group=self._tp)

    def hear_leader(self) -> tuple[Work, list[int]] | None:
        """The others of the first stage: what comes, and the tokens that its rows go on from; None at the end."""
        coded = torch.empty(3 + 6 * self._most_rows, dtype=torch.int64)
        dist.broadcast(coded, src=0, group=self._tp)
        return decode(coded)

    def send(self, work: Work | None, hidden: Tensor | None) -> None:
        """Tell the next stage what comes, and send it, [rows, length, hidden]; None: the end."""
        to = self._pipeline[self._stage + 1]
        self._keep(encode(work, (), self._most_rows), to, self._control, DESCRIPTION)
        if hidden is not None:
            self._keep(hidden.contiguous(), to, self.hidden_group, HIDDEN)

    def receive(self) -> tuple[Work, Tensor] | None:
        """Wait for what the stage before sends; None at the end."""
        source = self._pipeline[self._stage - 1]
        coded = torch.empty(3 + 6 * self._most_rows, dtype=torch.int64)
        _wait(dist.irecv(coded, source, group=self._control, tag=DESCRIPTION))
        if (heard := decode(coded)) is None:
            return None
        work, _ = heard
        shape = len(work.rows), work.length, self._hidden_size
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        _wait(dist.irecv(hidden, source, group=self.hidden_group, tag=HIDDEN))
        return work, hidden

    def send_tokens(self, tokens: Tensor, moment_ns: int) -> None:
        """Last stage, first of its ranks: tell rank 0 what was chosen, and when."""
        self._keep(torch.cat((torch.tensor([moment_ns]), tokens)), self._pipeline[0], self._control, TOKENS)

    def receive_tokens(self, count: int) -> tuple[int, list[int]]:
        """Rank 0: wait for what was chosen in the oldest pass; when, and the tokens."""
        numbers = torch.empty(1 + count, dtype=torch.int64)
        _wait(dist.irecv(numbers, self._pipeline[-1], group=self._control, tag=TOKENS))
        moment_ns, *tokens = numbers.tolist()
        return moment_ns, tokens

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _keep(self, tensor: Tensor, to: int, group: dist.ProcessGroup | None, tag: int) -> None:
        """Send a tensor, which lives until it has left."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        work = dist.isend(tensor, to, group=group, tag=tag)
        assert work is not None
        self._sent.append((work, tensor))


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()
