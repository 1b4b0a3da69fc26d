"""What the layers of a model take: one embedding, block and head, forward and both halves of backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.machine import detect_machine
from harness.model.assembly import LayerDescription, describe_layers
from harness.model.context import PassContext
from harness.model.groups import build_tensor_parallel
from harness.model.loss import PipelineLoss
from harness.model.precision import dtype_of
from harness.model.products import use_onednn
from harness.model.weight_gradients import WeightGradients, add_gradients
from harness.model.weights import initialize
from harness.record.heartbeat import Heart
from harness.record.store import Attempt, write_json
from harness.run.instruments.gemm import synchronize
from harness.run.tasks.train import set_up_device
from harness.spec.config import RunConfig
from harness.spec.layer_seconds import LayerSeconds, as_json, layer_seconds_file

REPEATS, FIRST = 15, 3
"""Measured passes, and those before them that are not."""


def probe(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Measure the layers, and write the seconds to result.json and where later configurations look for them."""
    machine = detect_machine()
    device = set_up_device(config, machine)
    phase = Heart(attempt.path, rank).phase
    phase("building the layers")
    use_onednn(config.model.onednn)
    later = WeightGradients()
    tp = build_tensor_parallel(
        config.parallel.topology, rank, config.model.num_key_value_heads,
        sequence_parallel=config.parallel.sequence_parallel, later=later,
    )  # fmt: skip
    checkpointing = config.train.activation_checkpointing == "full"
    layers = describe_layers(config.model, tp, checkpointing, PassContext(config.train.seed))
    modules = Modules(layers, config, device)
    initialize(modules.named(), config.model, tp, config.train.seed)
    loss = PipelineLoss(config.model.vocab_size, tp)
    shape = config.train.micro_batch_size, config.train.sequence_length
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    labels = tokens, torch.tensor(1.0 / tokens.numel(), device=device)
    phase("measuring the layers")
    with torch.no_grad():
        hidden = modules.run("embedding", tokens)
    passes: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "embedding": (lambda inputs: modules.run("embedding", inputs), tokens),
        "block": (lambda inputs: modules.run("block", inputs), hidden),
        "head": (lambda inputs: loss(modules.run("head", inputs), labels), hidden),
    }
    measured = {name: measure(compute, inputs, later, device) for name, (compute, inputs) in passes.items()}
    seconds = LayerSeconds(**measured)
    if rank != 0:
        return
    file = layer_seconds_file(config, machine)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, as_json(seconds))
    except OSError as error:
        print(f"not kept for later runs: {error}", flush=True)
    write_json(attempt.result_file, as_json(seconds))


class Modules:
    """The layers of one block, and of what is before and after it."""

    def __init__(self, layers: list[LayerDescription], config: RunConfig, device: torch.device) -> None:
        built: dict[str, nn.Module] = {}
        self._names: dict[str, nn.Module] = {}
        self._steps: dict[str, list[Callable[[Tensor], Tensor]]] = {"embedding": [], "block": [], "head": []}
        place = "embedding"
        for layer in layers:
            if layer.name.startswith("blocks."):
                place = "block"
            elif place == "block":
                place = "head"
            key = layer.tied_key or layer.name
            if key not in built:
                built[key] = layer.build().to(device, dtype_of(config.train.precision))
                self._names[key] = built[key]
            module, forward = built[key], layer.forward
            step = module if forward is None else lambda hidden, m=module, f=forward: f(m, hidden)
            self._steps[place].append(step)

    def named(self) -> Any:
        """Parameters by their global names."""
        for name, module in self._names.items():
            for path, parameter in module.named_parameters():
                yield f"{name}.{path}", parameter

    def run(self, place: str, hidden: Tensor) -> Tensor:
        """What its layers make of their input."""
        for step in self._steps[place]:
            hidden = step(hidden)
        return hidden


def measure(
    compute: Callable[[Tensor], Tensor], inputs: Tensor, later: WeightGradients, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of forward, input half and weight half, of the slowest rank."""
    samples: list[list[float]] = []
    for number in range(FIRST + REPEATS):
        leaf = inputs.detach().requires_grad_(inputs.is_floating_point())
        dist.barrier()
        moments = [time.perf_counter()]
        output = compute(leaf)
        synchronize(device)
        moments.append(time.perf_counter())
        torch.autograd.backward(output, torch.ones_like(output))
        synchronize(device)
        moments.append(time.perf_counter())
        add_gradients(later.take())
        synchronize(device)
        moments.append(time.perf_counter())
        if number >= FIRST:
            samples.append([end - begin for begin, end in pairwise(moments)])
    middle = torch.tensor([median(column) for column in zip(*samples, strict=True)], device=device, dtype=torch.float64)
    dist.all_reduce(middle, dist.ReduceOp.MAX)
    forward, backward_input, backward_weight = middle.tolist()
    return forward, backward_input, backward_weight
