"""Process groups whose ranks, where they are on one host and without GPUs, talk through memory that they share.

gloo takes about a millisecond for the smallest message between two processes that compute, whose cores must first wake
its threads. Here a rank copies what it has to say into its own memory, which the others map, and counts up; they look
at the count. All else, and all where that is not possible, is gloo's.

The memory has no name (`memfd_create`): it ends with the processes however they end, and its size is no matter of
/dev/shm. A count is seen after the data that was stored before it, as on x86-64 no store overtakes another.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    ReduceScatterOptions,
    Store,
)

BACKEND = "shared_memory"
"""Its name in torch.distributed."""
LINE = 64
"""Bytes of a cache line, of which each count has its own."""
SLOT_BYTES = 1 << 20
"""What is said at once; larger tensors go piece by piece, which stay in the cache."""
NUM_SLOTS = 4
"""What may be said before others have heard it."""
NUM_LANE_SLOTS = 4
"""Messages to one rank that may be under way in its lane."""
NUM_LANE_ENTRIES = 4096
"""Messages to one rank that may be under way at all: what has no slot goes over gloo."""
SPIN_SECONDS = 0.001
"""Until a rank that waits sleeps in between."""
LOOK_SECONDS = 0.2
"""Between looks at whether those that are waited for still live."""
SUMMED = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""Types whose sums are made here."""


class Unavailable(Exception):
    """Ranks can't share memory; says why."""


def register_backend() -> None:
    """Make the backend known to torch.distributed; once per process, before ranks meet."""
    dist.Backend.register_backend(BACKEND, SharedMemoryGroup, devices=["cpu"])


def transport_of(group: dist.ProcessGroup) -> str:
    """What carries the messages of a group, and why where that is the second choice."""
    return group.transport if isinstance(group, SharedMemoryGroup) else str(dist.get_backend(group))


def describe_transports(groups: Mapping[str, dist.ProcessGroup | None]) -> str:
    """What carries the messages of a rank's groups, told apart where they differ; empty for none.

    Args:
        groups: by what they are for, `tp` say; None where there is nobody to talk to.
    """
    found = {name: transport_of(group) for name, group in groups.items() if group is not None}
    if len(set(found.values())) < 2:
        return "".join(set(found.values()))
    return ", ".join(f"{name} {transport}" for name, transport in found.items())


def share_memory(wanted: bool) -> None:
    """Let the group of all ranks, and those that are made from now on, share memory where they can, or use gloo."""
    world = dist.group.WORLD
    if isinstance(world, SharedMemoryGroup):
        world.wanted = wanted


def _by_gloo(name: str) -> Any:
    """A method that leaves an operation to gloo.

    What a Python group does not define torch finds as well, but it then holds Python's lock while it waits for gloo's
    threads, which may wait for that lock.
    """

    return lambda group, *arguments, **options: group.by_gloo(name, *arguments, **options)


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group over gloo, some of whose operations go through memory. Ranks are those of the group."""

    all_gather_single_coalesced = _by_gloo("allgather_into_tensor_coalesced")
    allgather = _by_gloo("allgather")
    allgather_coalesced = _by_gloo("allgather_coalesced")
    allreduce_coalesced = _by_gloo("allreduce_coalesced")
    all_to_all_single = _by_gloo("alltoall_base")
    alltoall = _by_gloo("alltoall")
    barrier = _by_gloo("barrier")
    gather = _by_gloo("gather")
    reduce = _by_gloo("reduce")
    reduce_scatter = _by_gloo("reduce_scatter")
    reduce_scatter_single_coalesced = _by_gloo("reduce_scatter_tensor_coalesced")
    scatter = _by_gloo("scatter")

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        world = dist.group.WORLD
        self.wanted: bool = world.wanted if isinstance(world, SharedMemoryGroup) else True
        self._begun: deque[Exchange] = deque()
        self._lanes: dict[tuple[int, int, int], Lane] = {}
        """By sender, receiver and tag."""
        self._unavailable = "there is one rank"
        if size > 1 and self.wanted:
            try:
                self._memories, processes = meet(store, rank, size, 2 * Ring.num_bytes())
                self._peers = Peers(processes, timeout)
                self._said, self._sums = (
                    Ring(self._memories, first, rank, self._peers) for first in (0, Ring.num_bytes())
                )
                self._unavailable = ""
            except Unavailable as reason:
                self._unavailable = str(reason)

    def getBackendName(self) -> str:  # torch's
        """As torch asks."""
        return BACKEND

    @property
    def transport(self) -> str:
        """As `transport_of`."""
        if self._shares:
            return "shared memory"
        return f"gloo: {self._unavailable}" if self.wanted and self._unavailable else "gloo"

    @property
    def _shares(self) -> bool:
        return self.wanted and not self._unavailable

    def by_gloo(self, name: str, *arguments: Any, **options: Any) -> dist.Work:
        """An operation, by its name in gloo's group."""
        work: dist.Work = getattr(self._gloo, name)(*arguments, **options)
        return work

    # --- collectives: all ranks begin, and wait for, the same ones in the same order, those of other groups among them,
    # as nothing goes on while nobody waits

    def allreduce(  # type: ignore[override]
        self, tensors: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Sum or mean over ranks, in place; for a mean, pieces are divided while they are in the cache."""
        tensor, opts = tensors[0], opts or AllreduceOptions()
        is_mean = opts.reduceOp == dist.ReduceOp.AVG
        sums = (is_mean or opts.reduceOp == dist.ReduceOp.SUM) and tensor.dtype in SUMMED
        if len(tensors) > 1 or not sums or not self._takes(tensor):
            return self.by_gloo("allreduce", tensors, opts)
        factor = 1 / self._size if is_mean else 1.0
        if not (opts.asyncOp or self._begun) and tensor.nbytes <= SLOT_BYTES:
            return self._sum_at_once(tensor.view(-1), factor)
        pieces = _pieces(tensor)
        return self._begin(pieces, lambda number: self._sum(pieces[number], factor))

    @torch.no_grad()
    def _sum_at_once(self, piece: Tensor, factor: float) -> dist.Work:
        """What is small and waited for at once, as when single tokens are computed, needs no exchange to keep it."""
        self._said.say(piece)
        self._sum(piece, factor)
        self._said.heard()
        return Done()

    def _sum(self, piece: Tensor, factor: float) -> None:
        """Two ranks add what the other said. More add up a share each, and say the sum, so that all get the same."""
        if self._size == 2:
            piece.add_(self._said.hear(1 - self._rank, piece))
            if factor != 1:
                piece.mul_(factor)
            return
        shares = piece.tensor_split(self._size)
        own = shares[self._rank]
        torch.add(*(self._said.hear(rank, piece).tensor_split(self._size)[self._rank] for rank in (0, 1)), out=own)
        for rank in range(2, self._size):
            own.add_(self._said.hear(rank, piece).tensor_split(self._size)[self._rank])
        if factor != 1:
            own.mul_(factor)
        self._sums.say(own)
        for rank, share in enumerate(shares):
            if rank != self._rank:
                share.copy_(self._sums.hear(rank, share))
        self._sums.heard()

    def broadcast(  # type: ignore[override]
        self, tensors: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """What one rank has, to all."""
        tensor, opts = tensors[0], opts or BroadcastOptions()
        if len(tensors) > 1 or not self._takes(tensor):
            return self.by_gloo("broadcast", tensors, opts)
        root, pieces = opts.rootRank, _pieces(tensor)

        def hear(number: int) -> None:
            if self._rank != root:
                pieces[number].copy_(self._said.hear(root, pieces[number]))

        return self._begin(pieces if self._rank == root else [None] * len(pieces), hear)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """[n] of each rank -> [ranks x n] on all."""
        if not self._takes(input, output):
            return self.by_gloo("_allgather_base", output, input, opts or AllgatherOptions())
        pieces = _pieces(input)
        outputs = [_pieces(part) for part in output.view(self._size, -1)]

        def hear(number: int) -> None:
            for rank, parts in enumerate(outputs):
                parts[number].copy_(self._said.hear(rank, pieces[number]))

        return self._begin(pieces, hear)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """[ranks x n] on all -> [n], the sum of this rank's part."""
        opts = opts or ReduceScatterOptions()
        if opts.reduceOp != dist.ReduceOp.SUM or input.dtype not in SUMMED or not self._takes(input, output):
            return self._reduce_scatter_by_gloo(output, input, opts)
        share = max(1, SLOT_BYTES // self._size // input.itemsize)
        pieces = torch.split(input.view(self._size, -1), share, dim=1)
        sums = torch.split(output.view(-1), share)

        def hear(number: int) -> None:
            torch.add(*(self._said.hear(rank, pieces[number])[self._rank] for rank in (0, 1)), out=sums[number])
            for rank in range(2, self._size):
                sums[number].add_(self._said.hear(rank, pieces[number])[self._rank])

        return self._begin(pieces, hear)

    def _reduce_scatter_by_gloo(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        """gloo makes an all-reduce of it, in twice the time of this."""
        if opts.reduceOp != dist.ReduceOp.SUM or output.numel() == 0:
            return self.by_gloo("_reduce_scatter_base", output, input, opts)
        received = torch.empty_like(input)
        work = self.by_gloo("alltoall_base", received, input, [], [], AllToAllOptions())
        return Then(work, lambda: torch.sum(received.view(self._size, -1), dim=0, out=output.view(-1)))

    def _takes(self, *tensors: Tensor) -> bool:
        return self._shares and all(t.is_contiguous() and t.numel() > 0 and t.device.type == "cpu" for t in tensors)

    def _begin(self, pieces: Sequence[Tensor | None], hear: Callable[[int], None]) -> dist.Work:
        exchange = Exchange(self._said, pieces, hear, self._end)
        self._begun.append(exchange)
        self._say_ahead()
        return exchange

    @torch.no_grad()
    def _say_ahead(self) -> None:
        """Say what there is room for; whoever begins waits for nobody."""
        for exchange in self._begun:
            if not exchange.say_ahead():
                break

    @torch.no_grad()
    def _end(self, wanted: Exchange) -> None:
        """End what has begun, in its order, up to the exchange that is wanted."""
        while not wanted.is_completed():
            self._begun[0].end(self._say_ahead)
            self._begun.popleft()

    # --- messages from one rank to another

    def send(self, tensors: list[Tensor], receiver: int, tag: int) -> dist.Work:
        """Leave a message, or hand it to gloo where there is no slot for it; never waits."""
        (tensor,) = tensors
        if not self._takes(tensor):
            return self.by_gloo("send", tensors, receiver, tag)
        key = self._rank, receiver, tag
        return Done() if self._lane(key).put(tensor) else self.by_gloo("send", tensors, receiver, tag)

    def recv(self, tensors: list[Tensor], sender: int, tag: int) -> dist.Work:
        """Expect a message; those of one sender and tag come in their order."""
        (tensor,) = tensors
        if not self._takes(tensor):
            return self.by_gloo("recv", tensors, sender, tag)
        key = sender, self._rank, tag
        return Message(self._lane(key), tensor, partial(self.by_gloo, "recv", tensors, sender, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Of any sender: only gloo does that, which knows nothing of lanes."""
        if self._shares:
            raise NotImplementedError(
                "a message can't be received from any rank through shared memory; name its sender"
            )
        return self.by_gloo("recv_anysource", tensors, tag)

    def _lane(self, key: tuple[int, int, int]) -> Lane:
        if key not in self._lanes:
            self._lanes[key] = Lane(self._store, key, self._peers)
        return self._lanes[key]


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor in flat pieces that fit into a slot."""
    return torch.split(tensor.view(-1), SLOT_BYTES // tensor.itemsize)


class Done(dist.Work):
    """Nothing to wait for."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Don't."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


class Then(dist.Work):
    """Something else, and what is done after it."""

    def __init__(self, work: dist.Work, act: Callable[[], Any]) -> None:
        super().__init__()
        self._work, self._act = work, act

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until both are done."""
        self._work.wait()
        self._act()
        return True


class Exchange(dist.Work):
    """A collective: each rank says pieces, as many at once as there is room for, and then hears those of the others.

    Args:
        hear: does with what all have said what is to be done with a piece.
        end: ends exchanges in their order, up to a given one.
    """

    def __init__(
        self, ring: Ring, pieces: Sequence[Tensor | None], hear: Callable[[int], None], end: Callable[[Exchange], None]
    ) -> None:
        super().__init__()
        self._ring, self._pieces, self._hear, self._end_through = ring, pieces, hear, end
        self._num_said = self._num_heard = 0

    def say_ahead(self) -> bool:
        """Say what there is room for; whether all is said."""
        while self._num_said < len(self._pieces) and self._ring.has_room():
            self._say()
        return self._num_said == len(self._pieces)

    def _say(self) -> None:
        self._ring.say(self._pieces[self._num_said])
        self._num_said += 1

    def end(self, say_ahead: Callable[[], None]) -> None:
        """Say the rest, and hear the others.

        Args:
            say_ahead: called where there may be room.
        """
        while not self.is_completed():
            if self._num_said == self._num_heard:
                self._say()
            self._hear(self._num_heard)
            self._ring.heard()
            self._num_heard += 1
            say_ahead()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until the tensor holds the result."""
        self._end_through(self)
        return True

    def is_completed(self) -> bool:
        """Whether it does."""
        return self._num_heard == len(self._pieces)


class Ring:
    """What the ranks of a group say to all, the same number of things in the same order.

    In the memory of each: the number of things it has said and the bytes of those in slots, the number of those of all
    that it has heard, slots.
    """

    def __init__(self, memories: Sequence[Memory], first: int, rank: int, peers: Peers) -> None:
        self._said = [memory.word(first, 1 + NUM_SLOTS) for memory in memories]
        self._heard = [memory.word(first + LINE) for memory in memories]
        self._slots = [
            [memory.bytes(first + 2 * LINE + slot * SLOT_BYTES, SLOT_BYTES) for slot in range(NUM_SLOTS)]
            for memory in memories
        ]
        self._rank, self._peers = rank, peers
        self._num_said = self._num_heard = 0

    @staticmethod
    def num_bytes() -> int:
        """In the memory of one rank."""
        return 2 * LINE + NUM_SLOTS * SLOT_BYTES

    def has_room(self) -> bool:
        """Whether all have heard what was said in the next slot."""
        oldest = self._num_said - NUM_SLOTS
        return all(heard[0] > oldest for heard in self._heard)

    def say(self, piece: Tensor | None) -> None:
        """Say a tensor that fits into a slot, or nothing, where it is others whom all will hear."""
        self._peers.wait(self.has_room)
        if piece is not None:
            self._view(self._rank, self._num_said, piece).copy_(piece)
        said = self._said[self._rank]
        said[1 + self._num_said % NUM_SLOTS] = 0 if piece is None else piece.nbytes
        self._num_said += 1
        said[0] = self._num_said

    def hear(self, rank: int, like: Tensor) -> Tensor:
        """What a rank says next, of a known type and shape; stays as it is until `heard`.

        Raises:
            RuntimeError: it is of another size: ranks do not do the same.
        """
        said, number = self._said[rank], self._num_heard
        self._peers.wait(lambda: said[0] > number)
        num_bytes = said[1 + number % NUM_SLOTS]
        if num_bytes != like.nbytes:
            raise RuntimeError(f"rank {rank} of a group says {num_bytes} bytes where others say {like.nbytes}")
        return self._view(rank, number, like)

    def heard(self) -> None:
        """Go on to what comes next; what all ranks have heard is overwritten."""
        self._num_heard += 1
        self._heard[self._rank][0] = self._num_heard

    def _view(self, rank: int, number: int, like: Tensor) -> Tensor:
        return self._slots[rank][number % NUM_SLOTS][: like.nbytes].view(like.dtype).view(like.shape)


class Lane:
    """Messages of one rank to another under one tag, in their order.

    In the memory of the sender: the number of messages sent, the numbers of those taken and of the slots taken with
    them, of each message by which way it comes and its bytes, slots. For larger messages than fit into its slots it
    makes others.
    """

    OTHERWISE, IN_SLOT, IN_LARGER_SLOT = range(3)
    """Ways of a message."""

    def __init__(self, store: Store, key: tuple[int, int, int], peers: Peers) -> None:
        self._store, self._key, self._peers = store, key, peers
        self._memories: list[Memory] = []
        self._num_made = 0
        self.expected: deque[Message] = deque()

    @torch.no_grad()
    def put(self, tensor: Tensor) -> bool:
        """Send a message; False where there is no slot for it, and it is to go another way."""
        if not self._memories or tensor.nbytes > self._slots[0].nbytes:
            self._make(tensor.nbytes)
        fits = tensor.nbytes <= self._slots[0].nbytes
        has_slot = fits and self._num_in_slots - self._slots_taken[0] < NUM_LANE_SLOTS
        if has_slot:
            self._slots[self._num_in_slots % NUM_LANE_SLOTS][: tensor.nbytes].copy_(_bytes(tensor))
            self._num_in_slots += 1
        self._announce(self.IN_SLOT if has_slot else self.OTHERWISE, tensor.nbytes)
        return has_slot

    @torch.no_grad()
    def take(self, tensor: Tensor) -> bool:
        """Wait for the next message, and take it; False where it has no slot, and comes another way.

        Raises:
            RuntimeError: it is of another size: ranks do not do the same.
        """
        if not self._memories:
            self._find()
        while (announced := self._next())[0] == self.IN_LARGER_SLOT:
            self._find()
        way, num_bytes = announced
        if num_bytes != tensor.nbytes:
            raise RuntimeError(
                f"rank {self._key[0]} of a group sends {num_bytes} bytes where rank {self._key[1]} expects "
                f"{tensor.nbytes}"
            )
        if way == self.IN_SLOT:
            _bytes(tensor).copy_(self._slots[self._num_in_slots % NUM_LANE_SLOTS][: tensor.nbytes])
            self._num_in_slots += 1
            self._slots_taken[0] = self._num_in_slots
        self._number += 1
        self._taken[0] = self._number
        return way == self.IN_SLOT

    def _announce(self, way: int, num_bytes: int) -> None:
        self._peers.wait(lambda: self._number - self._taken[0] < NUM_LANE_ENTRIES)
        self._ways[self._number % NUM_LANE_ENTRIES] = 4 * num_bytes + way
        self._number += 1
        self._sent[0] = self._number

    def _next(self) -> tuple[int, int]:
        """By which way the next message comes, and its bytes."""
        self._peers.wait(lambda: self._sent[0] > self._number)
        num_bytes, way = divmod(self._ways[self._number % NUM_LANE_ENTRIES], 4)
        return way, num_bytes

    def _make(self, slot_bytes: int) -> None:
        """Of the sender: memory for messages of up to so many bytes, if there is any; without, old slots stay."""
        try:
            memory = Memory.make(3 * LINE + 8 * NUM_LANE_ENTRIES + NUM_LANE_SLOTS * slot_bytes)
        except Unavailable:
            if not self._memories:
                raise
            return
        if self._memories:
            self._announce(self.IN_LARGER_SLOT, 0)
            if self._num_made > 1 and self._taken[0] > 0:  # the other has left those before
                del self._memories[:-1]
        self._store.set(self._name(), f"{slot_bytes} {memory.address}")
        self._use(memory, slot_bytes)

    def _find(self) -> None:
        """Of the receiver: the memory that the sender has made, or will have made with its first message."""
        name = self._name()
        try:
            self._peers.wait(lambda: self._store.check([name]))
            slot_bytes, address = self._store.get(name).decode().split(" ", 1)
            memory = Memory.find(address)
        except (dist.DistError, Unavailable) as error:  # of the rank that keeps the store, or of the sender
            raise RuntimeError(f"connection closed by peer before its first message: {error}") from None
        self._memories.clear()
        self._use(memory, int(slot_bytes))

    def _name(self) -> str:
        return f"lane/{self._key}/{self._num_made}"

    def _use(self, memory: Memory, slot_bytes: int) -> None:
        self._memories.append(memory)  # of the sender, those before too: the other may not have found them yet
        self._num_made += 1
        self._number = self._num_in_slots = 0
        self._sent, self._taken, self._slots_taken = (memory.word(line * LINE) for line in range(3))
        self._ways = memory.word(3 * LINE, NUM_LANE_ENTRIES)
        first = 3 * LINE + 8 * NUM_LANE_ENTRIES
        self._slots = [memory.bytes(first + slot * slot_bytes, slot_bytes) for slot in range(NUM_LANE_SLOTS)]


class Message(dist.Work):
    """A message that is expected. Who waits for one takes those that were expected before it.

    Args:
        receive_otherwise: where the message has no slot.
    """

    def __init__(self, lane: Lane, tensor: Tensor, receive_otherwise: Callable[[], dist.Work]) -> None:
        super().__init__()
        self._lane, self._tensor, self._receive_otherwise = lane, tensor, receive_otherwise
        self._is_taken = False
        lane.expected.append(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until the tensor holds it."""
        while not self._is_taken:
            self._lane.expected.popleft()._take()
        return True

    def _take(self) -> None:
        if not self._lane.take(self._tensor):
            self._receive_otherwise().wait()
        self._is_taken = True

    def is_completed(self) -> bool:
        """Whether somebody has waited for it."""
        return self._is_taken


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as [bytes]."""
    return tensor.view(-1).view(torch.uint8)


class Memory:
    """Memory of one rank that others may map, which begins with a line for a token.

    Args:
        path: of the open file, whoever opened it.
        num_bytes: behind the first line.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        try:
            self._whole = torch.from_file(path, shared=True, size=LINE + num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise Unavailable(f"memory of another process can't be opened: {str(error).splitlines()[0]}") from None
        self._words = memoryview(self._whole[: LINE * (len(self._whole) // LINE)].numpy().data).cast("Q")
        self.address = ""
        self._descriptor: int | None = None

    @classmethod
    def make(cls, num_bytes: int) -> Memory:
        """New memory, of zeros, which costs what is written to."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise Unavailable(f"stores of {platform.machine()} may overtake each other")
        try:
            descriptor = os.memfd_create("shardwright", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, LINE + num_bytes)
        except (AttributeError, OSError) as error:
            raise Unavailable(f"there is no memory to share: {error}") from None
        memory, token = cls(f"/proc/self/fd/{descriptor}", num_bytes), secrets.randbits(63)
        memory._words[0] = token
        memory._descriptor, memory.address = descriptor, f"{os.getpid()} {descriptor} {token} {num_bytes}"
        return memory

    @classmethod
    def find(cls, address: str) -> Memory:
        """That of another rank."""
        pid, descriptor, token, num_bytes = address.split()
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            is_large_enough = Path(path).stat().st_size == LINE + int(num_bytes)
        except OSError as error:
            raise Unavailable(f"memory of another process can't be opened: {error.strerror}") from None
        memory = cls(path, int(num_bytes)) if is_large_enough else None
        if memory is None or memory._words[0] != int(token):
            raise Unavailable("its ranks don't see each other's processes")
        return memory

    def word(self, first: int, count: int = 1) -> memoryview:
        """Numbers of 8 bytes, each of which is stored at once, from a byte behind the first line on."""
        index = (LINE + first) // 8
        return self._words[index : index + count]

    def bytes(self, first: int, count: int) -> Tensor:
        """[count], from a byte behind the first line on."""
        return self._whole[LINE + first : LINE + first + count]

    def close(self) -> None:
        """No more ranks will map it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


def meet(store: Store, rank: int, size: int, num_bytes: int) -> tuple[list[Memory], dict[int, int]]:
    """Memory of every rank, and by their processes the ranks among all; those of the group call this at once.

    Raises:
        Unavailable: on all of them, if one can't map that of another.
    """
    problem, own = "", None
    try:
        own = Memory.make(num_bytes)
    except Unavailable as reason:
        problem = str(reason)
    among_all = dist.get_rank() if dist.is_initialized() else rank
    told = _tell(store, "memory", rank, size, f"{_host()} {among_all} {own.address}" if own else f"- {problem}")
    found: list[Memory] = []
    if problems := [text.partition(" ")[2] for text in told if text.startswith("- ")]:
        problem = problems[0]
    elif (num_hosts := len({text.partition(" ")[0] for text in told})) > 1:
        problem = f"its ranks are on {num_hosts} hosts"
    else:
        try:
            addresses = [text.split(" ", 2)[2] for text in told]
            found = [own if r == rank and own else Memory.find(address) for r, address in enumerate(addresses)]
        except Unavailable as reason:
            problem = str(reason)
    if problems := [text for text in _tell(store, "mapped", rank, size, problem) if text]:
        raise Unavailable(problems[0])
    found[rank].close()
    return found, {int(pid): int(number) for _, number, pid, *_ in map(str.split, told)}


def _tell(store: Store, what: str, rank: int, size: int, text: str) -> list[str]:
    """What every rank says."""
    store.set(f"{what}/{rank}", text)
    return [answer.decode() for answer in store.multi_get([f"{what}/{other}" for other in range(size)])]


def _host() -> str:
    """Differs between hosts."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


class Peers:
    """The processes of a group, watched for their end while one waits for them.

    Args:
        ranks: by process, among all.
    """

    def __init__(self, ranks: Mapping[int, int], timeout: timedelta) -> None:
        self._ranks, self._timeout = ranks, timeout

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Wait for them.

        Raises:
            RuntimeError: one has ended meanwhile, or the time is over.
        """
        if is_ready():
            return
        began = looked = time.monotonic()
        while not is_ready():
            now = time.monotonic()
            if now - began < SPIN_SECONDS:
                os.sched_yield()
                continue
            time.sleep(50e-6)
            if now - looked > LOOK_SECONDS:
                looked = now
                ended = [rank for pid, rank in self._ranks.items() if _has_ended(pid)]
                if ended and not is_ready():
                    raise RuntimeError(f"connection closed by peer: the process of rank {ended[0]} has ended")
                if now - began > self._timeout.total_seconds():
                    raise RuntimeError(f"timed out waiting for a rank of a group after {now - began:.0f} s")


def _has_ended(pid: int) -> bool:
    """Also of a process that nobody has waited for."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # the kernel is too old, or does not allow it
        return not psutil.pid_exists(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)
