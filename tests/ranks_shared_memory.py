"""Rank program: groups that share memory, beside gloo."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness.run import shared_memory
from harness.run.shared_memory import BACKEND, SLOT_BYTES, Memory, register_backend, transport_of

SLOT = SLOT_BYTES // 8
"""Elements of 8 bytes in a slot."""
SIZES = (1, 7, 1000, SLOT - 1, SLOT, SLOT + 1, 9 * SLOT + 5)
"""From one element to more slots than there are."""


def run(argument: dict[str, Any], folder: Path) -> Any:
    torch.set_num_threads(1)
    register_backend()
    dist.init_process_group(BACKEND, timeout=datetime.timedelta(seconds=60))
    answer = globals()[argument["check"]](**argument["with"])
    if argument["check"] != "a_rank_dies":
        dist.barrier()
    return answer


def both_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    shared = dist.new_group()
    assert transport_of(shared) == "shared memory"
    return shared, dist.new_group(backend="gloo")


def numbers(generator: torch.Generator, size: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose sums are exact in every type and order."""
    return torch.randint(-8, 8, (size,), generator=generator).to(dtype)


def collectives(seed: int, count: int) -> list[str]:
    """A random program of collectives, some of which are waited for later; what differs from gloo's."""
    shared, gloo = both_groups()
    rank, size = dist.get_rank(), dist.get_world_size()
    program, own = random.Random(seed), torch.Generator().manual_seed(1000 * seed + rank)
    differing: list[str] = []
    waiting: list[tuple[str, dist.Work, Tensor, Tensor]] = []

    def finish() -> None:
        name, work, ours, expected = waiting.pop(program.randrange(len(waiting)))
        work.wait()
        if not torch.equal(ours, expected):
            differing.append(name)

    for number in range(count):
        kind = program.choice(["all_reduce", "mean", "all_gather", "reduce_scatter", "broadcast"])
        dtype = program.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        elements = program.choice(SIZES)
        tensor = numbers(own, elements * (size if kind == "reduce_scatter" else 1), dtype)
        results = []
        for group, overlaps in ((gloo, False), (shared, True)):
            given = tensor.clone().requires_grad_(kind == "broadcast")  # of weights
            if kind == "all_reduce":
                result, work = given, dist.all_reduce(given, group=group, async_op=overlaps)
            elif kind == "mean" and group is gloo:  # whose own means round otherwise
                result, work = given, dist.all_reduce(given, group=group)
                result.mul_(1 / size)
            elif kind == "mean":
                result, work = given, dist.all_reduce(given, dist.ReduceOp.AVG, group, async_op=overlaps)
            elif kind == "broadcast":
                result, work = given, dist.broadcast(given, number % size, group=group, async_op=overlaps)
            elif kind == "all_gather":
                result = given.new_empty(size * elements)
                work = dist.all_gather_single(result, given, group=group, async_op=overlaps)
            else:
                result = given.new_empty(elements)
                work = dist.reduce_scatter_single(result, given, group=group, async_op=overlaps)
            results.append((result, work))
        (expected, _), (ours, work) = results
        waiting.append((f"{number}: {kind} of {elements} {dtype}", work, ours, expected))
        while len(waiting) > program.randrange(4):
            finish()
    while waiting:
        finish()
    return gathered(differing)


def gathered(own: list[str]) -> list[str]:
    everybody: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return [text for texts in everybody for text in texts]


def rounding() -> list[float]:
    """Sums of random numbers: the same bits on all ranks, and as near to the exact ones as any order of adding."""
    shared, gloo = both_groups()
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        own = torch.randn(3 * SLOT + 1, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
        exact = own.double()
        dist.all_reduce(exact, group=gloo)
        dist.all_reduce(own, group=shared)
        copies = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, own, group=gloo)
        assert all(torch.equal(copy, own) for copy in copies)
        errors.append(float((own.double() - exact).abs().max() / exact.abs().max() / torch.finfo(dtype).eps))
    return errors


def messages(seed: int) -> list[str]:
    """Messages between all ranks under several tags, some too many or too large for their slots."""
    shared, _ = both_groups()
    rank, size = dist.get_rank(), dist.get_world_size()
    program = random.Random(seed)
    lengths = [program.choice((1, 300, 2000)) for _ in range(4 * shared_memory.NUM_LANE_SLOTS)]
    lengths[0] = 300  # of the first slots
    sent, expected = [], []
    for other in (other for other in range(size) if other != rank):
        for tag in (0, 5):
            for number, length in enumerate(lengths):
                value = float(1000 * rank + 100 * tag + number)
                sent.append(dist.isend(torch.full((length,), value), other, group=shared, tag=tag))
    for other in (other for other in range(size) if other != rank):
        for tag in (5, 0):
            for number, length in enumerate(lengths):
                tensor, value = torch.empty(length), float(1000 * other + 100 * tag + number)
                expected.append((dist.irecv(tensor, other, group=shared, tag=tag), tensor, value))
    program.shuffle(expected)
    for work in (*(work for work, _, _ in expected), *sent):
        work.wait()
    return gathered([f"{tensor[:3]} for {value}" for _, tensor, value in expected if not bool((tensor == value).all())])


def fallbacks() -> list[list[str]]:
    """What carries a group, and what it sums up, where its ranks can't share memory, for one reason after another."""
    rank = dist.get_rank()
    found = []
    for patch in (
        hosts_differ, memory_is_not_found, memory_is_another, memory_is_not_made, machine_is_another, by_wish,
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patches:
            patch(patches, rank)
            group = dist.new_group()
        total = torch.full((5,), float(rank))
        dist.all_reduce(total, group=group)
        everything = torch.empty(10, dtype=torch.float32)
        dist.all_gather_single(everything, total, group=group)
        part = torch.empty(5)
        dist.reduce_scatter_single(part, everything, group=group)
        mean = torch.full((5,), float(rank))
        dist.all_reduce(mean, dist.ReduceOp.AVG, group)
        dist.destroy_process_group(group)
        is_right = [total.tolist(), part.tolist(), mean.tolist()] == [[1.0] * 5, [2.0] * 5, [0.5] * 5]
        found.append([transport_of(group), str(is_right)])
        found[-1].append(transport_of(dist.group.WORLD))
        shared_memory.share_memory(True)
    return found


def hosts_differ(patches: pytest.MonkeyPatch, rank: int) -> None:
    patches.setattr(shared_memory, "_host", lambda: f"host{rank}")


def memory_is_not_found(patches: pytest.MonkeyPatch, rank: int) -> None:
    right = Memory.find
    if rank == 1:  # the process it names has no such file
        patches.setattr(Memory, "find", lambda address: right(f"{os.getpid()} 1000000 {address.split(' ', 2)[2]}"))


def memory_is_another(patches: pytest.MonkeyPatch, rank: int) -> None:
    """The process of that number is another, as in another namespace, and has a file of that number and size."""
    right, make, made = Memory.find, Memory.make, list[str]()

    def remember(num_bytes: int) -> Memory:
        memory = make(num_bytes)
        made.append(memory.address)
        return memory

    def mistaken(address: str) -> Memory:
        return right(" ".join([*made[0].split()[:2], *address.split()[2:]]))

    if rank == 1:
        patches.setattr(Memory, "make", remember)
        patches.setattr(Memory, "find", mistaken)


def memory_is_not_made(patches: pytest.MonkeyPatch, rank: int) -> None:
    def no_memory(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    if rank == 1:
        patches.setattr(os, "memfd_create", no_memory)


def machine_is_another(patches: pytest.MonkeyPatch, rank: int) -> None:
    patches.setattr(shared_memory.platform, "machine", lambda: "aarch64")


def by_wish(patches: pytest.MonkeyPatch, rank: int) -> None:
    shared_memory.share_memory(False)


def leftovers() -> list[int]:
    """Descriptors of a process, and names in /dev/shm, that thirty groups have left."""
    before = list(counts())
    for _ in range(30):
        group = dist.new_group()
        dist.all_reduce(torch.ones(3), group=group)
        assert not [path for path in Path("/proc/self/fd").iterdir() if "memfd:" in str(path.resolve())]
        other = 1 - dist.get_rank()
        sent, received = (act(torch.ones(3), other, group=group) for act in (dist.isend, dist.irecv))
        received.wait()
        dist.barrier(group=group)  # the other has opened this rank's lane
        dist.destroy_process_group(group)
        del group, sent, received
    return [after - number for after, number in zip(counts(), before, strict=True)]


def counts() -> Iterator[int]:
    process = psutil.Process()
    yield process.num_fds()
    yield len(list(Path("/dev/shm").iterdir()))


def a_rank_dies(during: str, victim: int, waiting: int) -> None:
    """Leaves what the rank says that waits for the killed one, the other of their group, and after how long."""
    shared = dist.new_group(sorted([victim, waiting]))
    if is_member := dist.get_rank() in (victim, waiting):
        dist.all_reduce(torch.ones(3), group=shared)
    dist.barrier()  # rank 0 keeps what they tell each other
    if not is_member:
        return
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        if during == "collective":
            dist.all_reduce(torch.ones(3), group=shared)
        else:
            dist.recv(torch.ones(3), victim, group=shared)
    except RuntimeError as error:
        Path("said.json").write_text(json.dumps({"error": str(error), "seconds": time.monotonic() - began}))


def refusals() -> list[str]:
    """What rank 0 is told of collectives in which ranks do not do the same, and of messages."""
    shared, _ = both_groups()
    said = []
    for act in (
        lambda: dist.all_reduce(torch.ones(3 + dist.get_rank()), group=shared),
        lambda: (
            dist.recv(torch.ones(4), 1, group=shared)
            if dist.get_rank() == 0
            else dist.send(torch.ones(3), 0, group=shared)
        ),
        lambda: dist.recv(torch.ones(3), group=shared),
    ):
        try:
            act()
        except (RuntimeError, NotImplementedError) as error:
            said.append(str(error))
    return said
