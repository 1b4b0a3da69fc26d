"""A stand-in for `torch.cuda` and NCCL on a machine without a GPU: the branches for GPUs run, on tensors of the CPU.

Every tensor stays in host memory and computes as it would there. What is kept beside it is where a GPU would have it:
each storage has a device, `tensor.device` tells it, results are where their operands are, and operands on two devices
are refused as torch refuses them. `$STANDIN_GPUS` is the number of devices. `torch.cuda` keeps the current device,
context, events and, for each device, the bytes of the storages on it.

Groups that ask for NCCL get gloo, and NCCL's rules: a collective takes contiguous tensors of the device that the
process is bound to (`init_process_group(device_id=...)`, as DeepSpeed calls it, or the first one used) and no others,
and a group ends on all of its ranks together.

Known gaps: a gradient that autograd has just made has no device of its own until it is read from a parameter, and
counts as one of the current device; kernels run at once, so streams order nothing; memory that an allocator would keep
is free.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
TOTAL_BYTES = 8 * 2**30
"""Of each device."""
HANG_SECONDS = 30
"""After which what NCCL would wait for in vain is an error."""


class Devices:
    """Which storages are on which device, and how much that is."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current = 0
        self.is_initialized = False
        self.allocated, self.peak = [0] * count, [0] * count
        self.calls: list[tuple[Any, ...]] = []
        """What was asked of the current device, in order: ("set_device", 1), ("synchronize", 1) ..."""
        self._place: dict[int, torch.device] = {}
        """Address of a storage -> its device; storages that nobody placed are missing."""

    def of(self, tensor: torch.Tensor) -> torch.device | None:
        """Where a tensor is; None where nobody has said."""
        return self._place.get(tensor.untyped_storage()._cdata)

    def place(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Say where the storage of a tensor is."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._place:
            return
        self._place[key] = device
        if device.type == "cuda":
            self.allocated[device.index] += size
            self.peak[device.index] = max(self.peak[device.index], self.allocated[device.index])
        weakref.finalize(storage, self._free, key, size, device)

    def _free(self, key: int, size: int, device: torch.device) -> None:
        self._place.pop(key, None)
        if device.type == "cuda":
            self.allocated[device.index] -= size

    def named(self, device: Any) -> torch.device:
        """A device by any name torch takes; without an index the current one.

        Raises:
            RuntimeError: there is no such GPU.
        """
        if device is None:
            device = self.current
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", self.current)
        if found.type == "cuda" and found.index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return found


# Functions that may have operands on several devices: copies, and looking things up by indices of the host.
CROSSING = frozenset(
    """copy_ _foreach_copy_ type_as __getitem__ __setitem__ index_put index_put_
    _has_compatible_shallow_copy_type""".split()
)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """What nested lists, tuples and dictionaries hold, in order; torch's own search takes four times as long."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


class OnDevices(TorchFunctionMode):
    """Runs every function of torch on the CPU, and keeps on whose device its tensors would be."""

    def __init__(self, devices: Devices, in_backward: bool = False) -> None:
        super().__init__()
        self.devices, self.in_backward = devices, in_backward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args, kwargs)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(func, name, args, kwargs)
        if name in ("pin_memory", "record_stream"):
            return args[0] if name == "pin_memory" else None
        if name == "numpy" and self._device(args[0]).type == "cuda":
            raise TypeError(
                f"can't convert {self._device(args[0])} device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if name == "get_device":
            device = self._device(args[0])
            return device.index if device.type == "cuda" else -1
        if name == "type" and len(args) == 1 and not kwargs:
            kind = func(*args)
            return kind.replace("torch.", "torch.cuda.") if self._device(args[0]).type == "cuda" else kind
        return self._compute(func, name, args, kwargs)

    def _device(self, tensor: torch.Tensor) -> torch.device:
        known = self.devices.of(tensor)
        return known if known is not None else torch.device("cuda", self.devices.current)

    def _attribute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        attribute, owner = func.__self__.__name__, args[0]
        if name == "__get__" and attribute == "device":
            return self._device(owner)
        if name == "__get__" and attribute == "is_cuda":
            return self._device(owner).type == "cuda"
        result = func(*args, **kwargs)
        if attribute == "grad":
            gradient = result if name == "__get__" else args[1]
            if gradient is not None:
                self._same_device("grad", [owner, gradient])
                self.devices.place(gradient, self._device(owner))
        return result

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        device = kwargs.get("device")
        if name != "to":
            device = "cpu" if name == "cpu" else rest[0] if rest else device if device is not None else "cuda"
            rest, kwargs = [CPU], {}
        for position, argument in enumerate(rest):
            if isinstance(argument, torch.Tensor):
                device, rest[position] = self._device(argument), argument.dtype
            elif isinstance(argument, (torch.device, str, int)) and not isinstance(argument, bool) and name == "to":
                device, rest[position] = argument, CPU
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        known = self.devices.of(tensor)
        target = self.devices.named(device) if device is not None else known
        moved = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if moved is tensor and device is not None and known != target:
            moved = tensor.clone()
        if moved is not tensor and target is not None:
            self.devices.place(moved, target)
        return moved

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        operands = tensors_in((args, kwargs))
        device = None
        if kwargs.get("device") is not None:
            device = self.devices.named(kwargs["device"])
            kwargs["device"] = CPU
        elif not operands:
            device = CPU
        indexes_the_host = "item" in name or "index" in name
        if name not in CROSSING or (indexes_the_host and operands and self.devices.of(operands[0]) == CPU):
            self._same_device(name, operands)
        result = func(*args, **kwargs)
        if device is None:
            known = [(operand.dim(), place) for operand in operands if (place := self.devices.of(operand)) is not None]
            device = max(known, key=lambda pair: (pair[0] > 0, pair[1].type == "cuda"))[1] if known else None
        if device is not None:
            own = {id(operand) for operand in operands}
            for value in tensors_in(result):
                if id(value) not in own and value.layout == torch.strided:
                    self.devices.place(value, device)
        return result

    def _same_device(self, name: str, tensors: list[torch.Tensor]) -> None:
        at = self._device if self.in_backward else self.devices.of
        places = {place for tensor in tensors if tensor.dim() and (place := at(tensor)) is not None}
        places |= {place for tensor in tensors if (place := at(tensor)) not in (None, CPU)}
        if len(places) > 1:
            first, second = sorted(map(str, places))[:2]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}! "
                f"(when checking arguments of {name})"
            )


class Event:
    """A moment of a stream, by the host's clock: kernels run as they are launched."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing, self._moment_ns = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self._moment_ns = time.monotonic_ns()

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing and self._moment_ns and end._moment_ns):
            raise RuntimeError("Both events must be recorded and created with enable_timing=True")
        return (end._moment_ns - self._moment_ns) / 1e6

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


class Stream:
    """A queue that is always empty."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = DEVICES.named(device)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "synchronize"):
            return lambda *_: None
        if name == "query":
            return lambda: True
        raise AttributeError(name)


DEVICES = Devices(int(os.environ.get("STANDIN_GPUS", "0")))


def install() -> None:
    """Put the stand-in into torch, for the life of this process."""
    _install_cuda()
    _install_distributed()
    run_backward = torch.autograd._engine_run_backward

    def run_backward_on_devices(*args: Any, **kwargs: Any) -> Any:
        with OnDevices(
            DEVICES, in_backward=True
        ):  # torch leaves the mode to call `backward`; what autograd calls is to be seen, too
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_on_devices
    # `checkpoint` compares what it kept inside a function, where the mode is left, with what it computes again.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}
    OnDevices(DEVICES).__enter__()


def _install_cuda() -> None:
    cuda, count, capability = torch.cuda, DEVICES.count, os.environ.get("STANDIN_COMPUTE_CAPABILITY", "9.0")
    major, minor = map(int, capability.split("."))

    def initialize() -> None:
        DEVICES.is_initialized = True

    def set_device(device: Any) -> None:
        initialize()
        DEVICES.current = DEVICES.named(device).index
        DEVICES.calls.append(("set_device", DEVICES.current))

    def synchronize(device: Any = None) -> None:
        DEVICES.calls.append(("synchronize", DEVICES.named(device).index))

    def by_device(values: list[int]) -> Callable[..., int]:
        return lambda device=None: values[DEVICES.named(device).index]

    def reset_peak(device: Any = None) -> None:
        index = DEVICES.named(device).index
        DEVICES.peak[index] = DEVICES.allocated[index]
        DEVICES.calls.append(("reset_peak_memory_stats", index))

    def free_and_total(device: Any = None) -> tuple[int, int]:
        return TOTAL_BYTES - DEVICES.allocated[DEVICES.named(device).index], TOTAL_BYTES

    class Selected:
        """`torch.cuda.device(index)`, a context."""

        def __init__(self, device: Any) -> None:
            self._index = DEVICES.named(device).index

        def __enter__(self) -> None:
            self._before, DEVICES.current = DEVICES.current, self._index

        def __exit__(self, *_: Any) -> None:
            DEVICES.current = self._before

    @contextlib.contextmanager
    def on_stream(stream: Stream | None) -> Iterator[None]:
        yield

    properties = SimpleNamespace(
        name="Stand-in GPU", total_memory=TOTAL_BYTES, major=major, minor=minor, multi_processor_count=132
    )
    replaced = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "is_initialized": lambda: DEVICES.is_initialized,
        "init": initialize,
        "_lazy_init": initialize,
        "_lazy_call": lambda call, **_: call(),
        "set_device": set_device,
        "current_device": lambda: DEVICES.current,
        "synchronize": synchronize,
        "device": Selected,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: major >= 8,
        "memory_allocated": by_device(DEVICES.allocated),
        "memory_reserved": by_device(DEVICES.allocated),
        "max_memory_allocated": by_device(DEVICES.peak),
        "max_memory_reserved": by_device(DEVICES.peak),
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": free_and_total,
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "default_generators": (torch.default_generator,) * count,
        "Event": Event,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.nccl.version = lambda: (2, 29, 7)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None  # type: ignore[assignment]
    torch.from_numpy = _on_the_host(torch.from_numpy)
    torch.frombuffer = _on_the_host(torch.frombuffer)


def _on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        DEVICES.place(tensor, CPU)
        return tensor

    return made


def _install_distributed() -> None:
    """NCCL's name and rules over gloo's transport."""
    backends: dict[int, str] = {}
    bound: dict[str, torch.device] = {}
    make_world, make_group, collective_device = c10d.init_process_group, c10d.new_group, c10d._get_object_coll_device
    destroy_group = c10d.destroy_process_group

    def backend_of(group: Any = None) -> str:
        return backends.get(id(group or c10d._get_default_group()), "gloo")

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        make_world("gloo", *args, **kwargs)
        backends[id(c10d._get_default_group())] = backend or "gloo"
        if device_id is not None:
            bound["device"] = DEVICES.named(device_id)

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        claimed = backend or backend_of()
        group = make_group(ranks, timeout, "gloo" if claimed == "nccl" else claimed, *args, **kwargs)
        backends[id(group)] = claimed
        return group

    def check(group: Any, tensors: list[torch.Tensor]) -> None:
        if backend_of(group) != "nccl":
            if wrong := [place for t in tensors if (place := DEVICES.of(t)) is not None and place.type != "cpu"]:
                raise RuntimeError(f"No backend type associated with device type {wrong[0].type}")
            return
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise ValueError("Tensors must be contiguous")
            place = DEVICES.of(tensor) or torch.device("cuda", DEVICES.current)
            if place.type != "cuda":
                raise RuntimeError("No backend type associated with device type cpu")
            if place != bound.setdefault("device", place):
                raise RuntimeError(f"Tensor found on device {place} but backend constrained to {bound['device']}")

    def destroy_process_group(group: Any = None) -> None:
        if group is not None and backend_of(group) == "nccl" and group.size() > 1:
            try:
                group.monitored_barrier(timedelta(seconds=HANG_SECONDS), wait_all_ranks=False)
            except RuntimeError as error:
                raise RuntimeError(f"a communicator of NCCL ends on all its ranks together: {error}") from None
        destroy_group(group)

    def checked(communicate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(communicate)
        def communicate_checked(*args: Any, **kwargs: Any) -> Any:
            groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
            check(groups[0] if groups else None, tensors_in((args, kwargs)))
            with torch._C.DisableTorchFunction():  # gloo sees what the tensors are, not where they would be
                return communicate(*args, **kwargs)

        return communicate_checked

    names = """all_reduce broadcast reduce all_gather all_gather_into_tensor all_gather_single gather scatter
    reduce_scatter reduce_scatter_tensor reduce_scatter_single all_to_all all_to_all_single
    send recv isend irecv""".split()
    replaced: dict[str, Any] = {name: checked(getattr(c10d, name)) for name in names if hasattr(c10d, name)} | {
        "init_process_group": init_process_group,
        "new_group": new_group,
        "destroy_process_group": destroy_process_group,
        "get_backend": backend_of,
        "is_nccl_available": lambda: True,
    }
    for name, value in replaced.items():
        setattr(c10d, name, value)
        setattr(dist, name, value)
    c10d._get_object_coll_device = lambda group=None: (
        "cuda" if backend_of(group) == "nccl" else collective_device(group)
    )
