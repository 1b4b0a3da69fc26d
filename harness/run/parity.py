"""Does a layout compute the training of one rank?

A layout is compared with a plain-torch reference in float64 that has no parallelism and none of our loss,
clipping, accumulation or optimizer policy: from the same weights, random in every parameter, and the same
samples, some of whose targets are masked. Compared are

- the loss and the gradient of every parameter, read just before the optimizer instruction, and the global
  norm before clipping (a wrong collective, slice, bias, scale or missing reduction);
- the weights after several steps of plain SGD under a falling learning rate, with and without clipping (a wrong
  scale or clip, a step taken twice);
- the weights and moments after several steps of AdamW under a rising learning rate (betas, which parameters decay).

Dropout is compared too where one tensor-parallel rank holds every head: the reference draws the masks that
`harness.model.dropout` defines for each replica, step and micro-batch.

A step that fp16's loss scaling skips, because its gradients overflowed, is repeated with the smaller scale; the
reference takes it once.

A difference is judged by its norm over the norm of the reference, or over 1e-3 of the largest such norm
of its kind where that is greater: a gradient that is zero in theory (GPT-2's key bias) has no scale of its own.
Where the gradients of samples cancel, it is the root of the sum of their squared norms: roundings don't cancel.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harness.model.context import Documents, stream_seed
from harness.model.loss import IGNORE_INDEX
from harness.model.precision import dtype_of
from harness.model.weights import unshard
from harness.record.heartbeat import Phase, no_phase
from harness.run.data import MicroBatch, Sample, documents_of, micro_batches
from harness.run.engines.engine import Before, Engine, build_engine
from harness.run.engines.torch.engine import TorchEngine
from harness.spec.architecture import UP
from harness.spec.config import Model, RunConfig
from harness.spec.parameters import parameter_table
from harness.spec.schedules import Instruction

MOST_REPETITIONS = 64
"""Of a step that overflows in fp16: more often than a loss scale can be halved."""

SMALLEST_SCALE = 1e-3
"""Of the largest norm of a kind: the least a difference is measured against."""

ROUNDING = 2.0**-24
"""Half a unit in the last place of fp32: each step rounds every weight by up to that share of itself."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """The worst difference of one kind."""

    kind: str
    worst: str
    """Parameter, and where it lives."""
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Within tolerance; NaN is not."""
        return self.error <= self.tolerance


# Rounding to p bits errs by 2^-p at most; a sum of independent roundings through a few layers stays within
# some tens of that. fp32 (2^-24 = 6e-8) is given 1e-5, a hundredth of the smallest defect worth catching, a
# factor of 1.001. bf16 (2^-8 = 4e-3) can only catch errors of several per cent.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
# A loss and a norm add up thousands of roundings of either sign, which leave a fifth of that at most.
NUMBER_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


@dataclass(frozen=True)
class Variant:
    """Settings of the optimizer under which layout and reference take some steps."""

    label: str
    train: dict[str, Any]
    """Changes to the section `train`."""
    learning_rates: tuple[float, ...]
    """Of each step, worked out by hand from `train`."""
    compared: tuple[str, ...]
    """What is compared after the last step, in the words of `state_of`."""


# AdamW divides a gradient by about its own size, which makes noise of roundings in small ones. With an epsilon far
# above them the division is by nearly the same number everywhere, and errors stay as small as in SGD. Decay of 1 per
# unit of learning rate moves the weights by about as much as the gradients do.
ADAMW = {
    "optimizer": "adamw", "learning_rate": 0.1, "learning_rate_warmup_steps": 2, "learning_rate_decay": "constant",
    "adam_epsilon": 1.0, "weight_decay": 1.0,
}  # fmt: skip
# After its peak the cosine is at half its height in the middle of the other steps, then at its end, a tenth.
SGD = {
    "optimizer": "sgd", "learning_rate": 0.1, "learning_rate_warmup_steps": 0, "learning_rate_decay": "cosine",
    "steps": 2,
}  # fmt: skip
VARIANTS = (
    Variant("AdamW", ADAMW, (0.05, 0.1), ("update", "exp_avg", "exp_avg_sq")),
    Variant("SGD", {**SGD, "gradient_clipping": 0.0}, (0.1, 0.055, 0.01), ("update",)),
    Variant("SGD, clipped", {**SGD, "gradient_clipping": 0.5}, (0.1, 0.055, 0.01), ("update",)),
)


class MaskedSamples:
    """Random tokens, of rows as `data.documents` says; every seventh target is left out of the loss."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def sample(self, step: int, number: int) -> Sample:
        """A row of the global batch."""
        train = self._config.train
        generator = np.random.default_rng([train.seed, step, number])
        tokens = generator.integers(0, self._config.model.vocab_size, train.sequence_length + 1)
        inputs, targets = tokens[:-1].copy(), tokens[1:].copy()
        targets[generator.random(train.sequence_length) < 1 / 7] = IGNORE_INDEX
        end = sum(self.lengths(step, number))
        inputs[end:], targets[end:] = 0, IGNORE_INDEX
        return Sample(inputs, targets)

    def lengths(self, step: int, number: int) -> list[int]:
        """Positions of each document of a row: some documents of about a third of it, or one of random length."""
        length, kind = self._config.train.sequence_length, self._config.data.documents
        generator = np.random.default_rng([self._config.train.seed, step, number, 1])
        if kind == "packed":
            return [int(n) for n in generator.integers(1, max(2, length // 3), size=min(3, length))]
        return [int(generator.integers(length // 3 + 1, length + 1))] if kind == "padded" else [length]

    def num_valid_targets(self, step: int) -> int:
        """Those of the global batch that are not left out."""
        numbers = range(self._config.train.global_batch_size)
        return sum(int((self.sample(step, number).targets >= 0).sum()) for number in numbers)


def random_weights(model: Model, seed: int) -> Tensors:
    """Full weights in float32, random in every parameter: fresh biases of zero would hide wrong slices.

    Before a ReLU, biases of either sign are many deviations large: at its kink rounding would decide what is on.
    """
    weights = {}
    for name, spec in parameter_table(model).items():
        generator = torch.Generator().manual_seed(stream_seed(seed, name, "parity"))
        noise = torch.randn(spec.shape, generator=generator)
        weights[name] = {"ones": 1 + 0.1 * noise, "zeros": 0.1 * noise}.get(spec.init, 0.05 * noise)
        if model.architecture.activation == "relu" and name.endswith(f"{UP}.bias"):
            weights[name] += 2 * noise.sign()
    return weights


DECAYING = (
    "embedding.weight",
    "head.weight",
    "qkv.weight",
    "output.weight",
    "up.weight",
    "down.weight",
    "dense.weight",
)
"""How the names of parameters end to which AdamW's weight decay applies: matrices, embeddings among them."""


class Reference(TorchEngine):
    """One rank of plain torch in float64, which also sees how much the gradients of samples cancel.

    Its optimizer is not that of `harness.run.optimizer`: weight decay goes by the names of parameters.
    """

    def __init__(self, config: RunConfig, weights: Tensors, learning_rates: Sequence[float]) -> None:
        # Rounded as the layout's are, then exact.
        dtype = dtype_of(config.train.precision)
        own = {name: weight.to(dtype).double() for name, weight in weights.items()}
        without = {"activation_checkpointing": "none"}
        config = config.model_copy(update={"train": config.train.model_copy(update=without)})
        super().__init__(config, learning_rates.__getitem__, own.__getitem__, dtype=torch.float64)
        self.initial = self.optimizer_state("weight")
        self.cancelling = dict.fromkeys(self.initial, 1.0)
        """How much larger each gradient would be, did those of the samples not cancel; the most of any step."""
        self._squares = dict.fromkeys(self.initial, 0.0)
        self.before_clipping: Tensors = {}
        self.observers.append(Before("optimizer", self._look_at_gradients))

    def _build_optimizer(self) -> torch.optim.Optimizer:
        train, named = self.config.train, dict(self.parameters())
        if train.optimizer == "sgd":
            return torch.optim.SGD(named.values())
        groups = [
            {"params": [p for n, p in named.items() if n.endswith(DECAYING)], "weight_decay": train.weight_decay},
            {"params": [p for n, p in named.items() if not n.endswith(DECAYING)], "weight_decay": 0.0},
        ]
        first, second = train.adam_betas
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(first, second), eps=train.adam_epsilon, foreach=False
        )

    def instructions(self, num_micro_batches: int) -> list[Instruction]:
        """One micro-batch after the other, whatever the schedule that is judged says."""
        passes = [
            Instruction(kind, number) for number in range(num_micro_batches) for kind in ("load", "forward", "backward")
        ]
        return [*passes, Instruction("optimizer"), Instruction("reduce_loss")]

    def backward(self, losses: Tensor) -> None:
        """Sample by sample, but for fp32, which keeps well within its tolerance without."""
        if self.config.train.precision == "fp32":
            super().backward(losses)
            return
        named = dict(self.parameters())
        for loss in losses:
            for (name, parameter), gradient in zip(
                named.items(), torch.autograd.grad(loss, tuple(named.values()), retain_graph=True), strict=True
            ):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                self._squares[name] += float(gradient.square().sum())

    def _look_at_gradients(self) -> None:
        self.before_clipping = self.gradients()
        for name, gradient in self.before_clipping.items():
            if (squares := self._squares[name]) and (own := float(gradient.norm())) > 0:
                self.cancelling[name] = max(self.cancelling[name], squares**0.5 / own)
            self._squares[name] = 0.0


class Layout:
    """The engine under test; a step is a collective call."""

    def __init__(self, config: RunConfig, weights: Tensors, rank: int) -> None:
        self.config, self.rank = config, rank
        self.engine = build_engine(config, rank, weights.__getitem__)
        self.gradients: Tensors = {}
        self.initial = self.engine.optimizer_state("weight")
        self.engine.observers.append(Before("optimizer", self._read_gradients))
        self._data = self._samples_from(0)

    def _samples_from(self, step: int) -> Iterator[MicroBatch]:
        dp_rank = self.engine.topology.coordinate(self.rank).dp
        return micro_batches(self.config, MaskedSamples(self.config), dp_rank, step)

    def _read_gradients(self) -> None:
        self.gradients = self.engine.gradients()

    def step(self, step: int) -> float:
        """One optimizer step, whose gradients are kept; its loss."""
        loss = float("nan")
        self.engine.context.documents = documents_at(step, self.config)
        for _ in range(MOST_REPETITIONS):
            skipped = self.engine.steps_skipped
            loss = self.engine.train_step(self._data)
            if self.engine.steps_skipped == skipped:
                break
            self._data = self._samples_from(step)
        return loss

    def gather(self, local: Tensors) -> Tensors | None:
        """Full tensors on rank 0, `name @ stage s, replica d` for each copy; a collective call.

        Copies that differ over tensor-parallel ranks, where they must be equal, become NaN.
        """
        # As arrays: each tensor would be pickled as a file of its own.
        mine = {name: tensor.detach().double().cpu().numpy() for name, tensor in local.items()}
        ranks: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(mine, ranks, dst=0)
        if ranks is None:
            return None
        table, topology, full = parameter_table(self.config.model), self.engine.topology, {}
        for group in topology.groups("tp"):
            at = topology.coordinate(group[0])
            for name in ranks[group[0]]:
                slices = [torch.from_numpy(ranks[r][name]) for r in group]
                whole = unshard(slices, table[name])
                if table[name].shard_dim is None and not all(torch.equal(s, whole) for s in slices):
                    whole = torch.full_like(whole, torch.nan)
                full[f"{name} @ stage {at.pp}, replica {at.dp}"] = whole
        return full


def state_of(engine: Engine, initial: Tensors, key: str) -> Tensors:
    """Optimizer state of every parameter, or `update`, how far its weights have come."""
    if key == "update":
        return {name: weight - initial[name] for name, weight in engine.optimizer_state("weight").items()}
    return engine.optimizer_state(key)


def compare(
    kind: str,
    measured: Mapping[str, Tensor],
    expected: Tensors,
    tolerance: float,
    allowance: Mapping[str, float] | None = None,
    cancelling: Mapping[str, float] | None = None,
) -> Comparison:
    """The worst tensor of a kind; names of `measured` are `name @ where`.

    Args:
        allowance: norm of a difference that rounding alone explains, by name.
        cancelling: `Reference.cancelling`. Where terms cancel, what was rounded off each of them does not, so the
            difference is measured against what the norm would be if they did not cancel either.
    """
    norms = {name: float(torch.linalg.vector_norm(tensor)) for name, tensor in expected.items()}
    smallest = SMALLEST_SCALE * max(norms.values())
    missing = set(expected) - {key.split(" @ ")[0] for key in measured}
    if missing:
        return Comparison(kind, f"{min(missing)} is missing", float("nan"), tolerance)
    errors = {}
    scales = {name: norm * (cancelling or {}).get(name, 1.0) for name, norm in norms.items()}
    for key, tensor in measured.items():
        name = key.split(" @ ")[0]
        difference = float(torch.linalg.vector_norm(tensor.double() - expected[name]))
        excess = difference - (allowance or {}).get(name, 0.0)
        errors[key] = 0.0 if excess < 0 else excess / max(scales[name], smallest)  # NaN stays
    worst = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
    return Comparison(kind, worst, errors[worst], tolerance)


def compare_number(kind: str, measured: float, expected: float, tolerance: float) -> Comparison:
    """Two numbers."""
    return Comparison(kind, f"{measured:.9g}, expected {expected:.9g}", abs(measured / expected - 1), tolerance)


def check_parity(config: RunConfig, rank: int, phase: Phase = no_phase) -> list[Comparison]:
    """Compare the layout of `config` with one rank; a collective call, the answer is rank 0's.

    The model should be small (`harness.spec.twin`); every rank holds its full weights.

    Args:
        phase: told what is done next.
    """
    weights = random_weights(config.model, config.train.seed)
    results = []
    for variant in VARIANTS:
        varied = config.model_copy(update={"train": config.train.model_copy(update=variant.train)})
        results += _check_variant(variant, varied, weights, rank, phase)
        # Engines are full of cycles, and gloo's threads and connections end with the last reference.
        while gc.collect():
            pass
        gc.freeze()  # what is left are modules, which DeepSpeed's own collections need not look through
    return results


def _check_variant(variant: Variant, config: RunConfig, weights: Tensors, rank: int, phase: Phase) -> list[Comparison]:
    """Some steps of one optimizer setting."""
    label, num_steps = variant.label, len(variant.learning_rates)
    phase(f"building the layout for {label}")
    layout = Layout(config, weights, rank)
    reference = Reference(config, weights, variant.learning_rates) if rank == 0 else None
    tolerance, of_numbers = TOLERANCE[config.train.precision], NUMBER_TOLERANCE[config.train.precision]
    results = []
    global_batches = batches_of_one_rank(config)
    for step in range(num_steps):
        phase(f"step {step + 1} of {label}")
        loss, norm = layout.step(step), layout.engine.gradient_norm()
        gradients = layout.gather(layout.gradients) if step == 0 else None
        if reference is None:
            continue
        reference.steps_taken = layout.engine.steps_taken - 1  # dropout draws by it
        reference.context.documents = documents_at(step, config)
        expected_loss = reference.train_step(global_batches)
        if gradients is not None:
            results.append(compare_number(f"{label}: loss", loss, expected_loss, of_numbers))
            expected = reference.before_clipping
            kind = f"{label}: gradient"
            results.append(compare(kind, gradients, expected, tolerance, cancelling=reference.cancelling))
            found, wanted = (float("nan") if n is None else n for n in (norm, reference.gradient_norm()))
            results.append(compare_number(f"{label}: gradient norm", found, wanted, of_numbers))
    for state in variant.compared:
        phase(f"comparing {state} of {label}")
        measured = layout.gather(state_of(layout.engine, layout.initial, state))
        if reference is not None and measured is not None:
            rounding = num_steps * ROUNDING if state == "update" else 0.0
            expected = state_of(reference, reference.initial, state)
            allowance = {name: rounding * float(w.norm()) for name, w in reference.initial.items()}
            kind = f"{label}: {state} after {num_steps} steps"
            results.append(compare(kind, measured, expected, tolerance, allowance, reference.cancelling))
    layout.engine.destroy()
    return results


def documents_at(step: int, config: RunConfig) -> Documents | None:
    """Those of a step, however often it is repeated."""
    known = documents_of(config, MaskedSamples(config))
    return known and (lambda _, micro_batch, dp_rank: known(step, micro_batch, dp_rank))


def batches_of_one_rank(config: RunConfig) -> Iterator[MicroBatch]:
    """The samples of every global batch in their order, not by `harness.run.data` that deals them out to layouts."""
    samples, train = MaskedSamples(config), config.train
    for step in itertools.count():
        for first in range(0, train.global_batch_size, train.micro_batch_size):
            numbers = range(first, first + train.micro_batch_size)
            rows = [samples.sample(step, number) for number in numbers]
            tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            yield tokens, (targets, torch.tensor(torch.nan))


def worst_error(comparisons: Iterable[Comparison]) -> float:
    """Largest error over its tolerance decides; returned is that comparison's error."""
    return max(comparisons, key=lambda c: float("inf") if c.error != c.error else c.error / c.tolerance).error
