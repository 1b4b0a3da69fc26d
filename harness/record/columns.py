"""The one table of columns: what each means, where its value comes from, how repeats combine, how it is shown.

results.csv, results.md, the table in the terminal, the one in results/README.md and the summary in wandb follow from
it. A column's value is one of four things:

    layout     known before any run: a key of the configuration, or a function of it
    measured   a function of what a run measured (`MeasuredRun`, or of inference `MeasuredInference`: `inferred`); each
               run writes these into its result.json
    attempt    a function of an attempt and what became of it (`Tried`)
    compared   a function of a row and the row of one rank with the same settings, known when a sweep is reported

`python -m harness.record.columns` prints the table of results/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from statistics import median
from typing import Any, TypeVar

import numpy

from harness.record.inference import MeasuredInference
from harness.record.sources import MeasuredRun, Tried, is_oversubscribed
from harness.record.spread import detect_warmup, drift
from harness.record.steps import perplexity
from harness.spec.batching import Phase
from harness.spec.config import RunConfig
from harness.spec.counts import parameters
from harness.spec.generation import gives_prompts
from harness.spec.kv_cache import num_groups
from harness.spec.ring import ideal_bubble_of
from harness.spec.schedules import ideal_bubble_fraction_of, ideal_bubble_overhead_of, schedule_of

# --- how repeats combine: functions of the values that a point's measurements have, oldest first


def middle(values: Sequence[Any]) -> Any:
    """The median of numbers, where they differ; else the newest value."""
    known = _numbers(values)
    if len(set(known)) < 2:
        return values[-1]
    found = median(known)
    return round(found) if all(isinstance(value, int) for value in known) else found


def middle_rate(values: Sequence[Any]) -> Any:
    """The inverse of the inverses' median: what is something over step_seconds stays that."""
    known = _numbers(values)
    return values[-1] if len(set(known)) < 2 else 1 / median(1 / value for value in known)


def newest(values: Sequence[Any]) -> Any:
    """That of the newest."""
    return values[-1]


def largest(values: Sequence[Any]) -> Any:
    """The largest of those known."""
    return max((value for value in values if value is not None), default=None)


def _numbers(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


# --- how values are shown


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, empty for None: 0.0512, 98.7, 12,346."""
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def scaled(factor: float, digits: int = 3) -> Callable[[Any], str]:
    """Shows `factor` times a value."""
    return lambda value: number(factor * value, digits)


def percent(value: float) -> str:
    """Of a share: 0.123 is 12.3."""
    return f"{100 * value:.1f}"


LAYOUT, MODEL, STAGES, SETTING, MEASURED, COMPARED = range(6)
"""Places in the ranked table, from the left; what is compared has a table of its own."""


@dataclass(frozen=True)
class Shown:
    """How a column stands in the ranked table, which leaves it out where no row has a value."""

    header: tuple[str, str]
    """Two lines."""
    text: Callable[[Any], str] = str
    """Of a value that is known."""
    to: str = ""
    """It is a range: from this column to that one."""
    place: int = MEASURED
    """Within one place columns keep the order of results.csv."""
    dispensable: int = 0
    """Where the terminal is too narrow, the highest go first; 0 stays."""
    only_varying: bool = False
    """Left out unless points differ in it that agree in the columns `among`."""
    among: tuple[str, ...] = ("world_size",)


NOT_SHOWN = Shown(("", ""))


@dataclass(frozen=True)
class Column:
    """A column of results.csv. Its value comes from `layout`, from `measured` or `inferred`, from `attempt`, or from
    `compared`; None there: not known."""

    name: str
    unit: str
    """Empty for words, plain numbers and shares."""
    meaning: str
    """What results/README.md says, in Markdown on one line."""
    layout: str | Callable[[RunConfig], Any] | None = None
    """A key of the configuration, or a function of it."""
    asked: type | None = None
    """A point that was refused before it started shows the key's value where it is of this type; None: never."""
    measured: Callable[[MeasuredRun], Any] | None = None
    inferred: Callable[[MeasuredInference], Any] | None = None
    """Measured where nothing is trained."""
    tasks: tuple[str, ...] = ("train", "generate", "forward")
    """Where `layout` means something."""
    early: bool = False
    """Measured from the first step on; others after warm-up."""
    attempt: Callable[[Tried], Any] | None = None
    compared: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    """Of a row, and of that of one rank."""
    repeats: Callable[[Sequence[Any]], Any] = middle
    """The value of a point that was measured several times, from that of each."""
    of_all_steps: Callable[[Sequence[float]], Any] | None = None
    """The same, from the seconds of all timed steps, or measurements, of all repeats together."""
    shown: Shown = NOT_SHOWN


def percentile(share: int) -> Callable[[Sequence[float]], float]:
    """Of values, between which it interpolates."""
    return lambda values: float(numpy.percentile(values, share))


def _in_tera(flops: float | None) -> float | None:
    return flops and flops / 1e12


TRAIN, GENERATE, PASSES, INFERENCE = ("train",), ("generate",), ("train", "forward"), ("generate", "forward")
"""Tasks in which a column's layout means something."""
PHASES: dict[Phase, str] = {"prefill": "prompts", "decode": "tokens after the first"}
"""And what is computed in each."""
T = TypeVar("T")


def _of_passes(run: MeasuredInference, value: Callable[[], T]) -> T | None:
    """Of forward passes alone."""
    return value() if run.config.task == "forward" else None


def _of_sequences(run: MeasuredInference, value: Callable[[], T]) -> T | None:
    """Where tokens were generated."""
    return value() if run.config.task == "generate" else None


def _bubble_of(run: MeasuredInference, phase: str, kind: str) -> float | None:
    return _of_sequences(run, lambda: run.bubble(phase, kind))


def _overhead(fraction: float | None) -> float | None:
    """Of a bubble over T, the same over busy time."""
    return None if fraction is None else fraction / (1 - fraction)


def _num_groups(config: RunConfig) -> int:
    settings = config.generate
    requests = 1 if settings.prompt is not None else settings.num_requests or settings.batch_size
    return num_groups(config, min(settings.batch_size, requests))


def _times(name: str, is_rate: bool = True) -> Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]:
    """How many times as fast a row is as the other, by a column that is a rate, or seconds."""

    def ratio(row: Mapping[str, Any], one: Mapping[str, Any]) -> float | None:
        over, under = (row[name], one[name]) if is_rate else (one[name], row[name])
        return over / under if over and under else None

    return ratio


def _efficiency(row: Mapping[str, Any], one: Mapping[str, Any]) -> float | None:
    speedup = _times("tokens_per_second")(row, one)
    return speedup and speedup / row["world_size"]


COLUMNS = (
    Column("point", "", "folder under points/", attempt=lambda tried: tried.attempt.point.name),
    Column("status", "", "what became of it", attempt=lambda tried: tried.status["status"]),
    Column(
        "reason",
        "",
        "one sentence for every status but `ok`, and for `ok` with another `parity` than `pass`",
        attempt=lambda tried: tried.reason,
    ),
    Column(
        "tp",
        "",
        "tensor-parallel ranks that share every layer",
        layout="parallel.tp",
        asked=int,
        shown=Shown(("", "tp"), place=LAYOUT),
    ),
    Column(
        "pp",
        "",
        "pipeline stages",
        layout="parallel.pp",
        asked=int,
        shown=Shown(("", "pp"), place=LAYOUT),
    ),
    Column(
        "dp",
        "",
        "data-parallel replicas",
        layout="parallel.dp",
        asked=int,
        shown=Shown(("", "dp"), place=LAYOUT),
    ),
    Column("world_size", "", "ranks: tp x pp x dp", layout=lambda config: config.parallel.world_size),
    Column(
        "schedule",
        "",
        "order of forwards and backwards",
        tasks=TRAIN,
        layout="parallel.schedule",
        asked=str,
        shown=Shown(("", "schedule"), place=STAGES, only_varying=True),
    ),
    Column(
        "micro_batch_size",
        "samples",
        "of one forward pass",
        tasks=PASSES,
        layout="train.micro_batch_size",
        asked=int,
        shown=Shown(("micro", "batch"), place=LAYOUT),
    ),
    Column(
        "num_micro_batches",
        "",
        "m = global_batch_size / (micro_batch_size x dp), per step and pipeline",
        tasks=PASSES,
        layout=lambda config: config.num_micro_batches,
        shown=Shown(("", "m"), place=LAYOUT),
    ),
    Column(
        "global_batch_size",
        "samples",
        "of a step over all ranks",
        tasks=PASSES,
        layout="train.global_batch_size",
        asked=int,
        shown=Shown(("global", "batch"), place=SETTING, only_varying=True),
    ),
    Column(
        "sequence_length",
        "tokens",
        "of a sample",
        tasks=PASSES,
        layout="train.sequence_length",
        asked=int,
        shown=Shown(("sequence", "length"), place=SETTING, only_varying=True),
    ),
    Column(
        "precision",
        "",
        "as configured",
        layout="train.precision",
        asked=str,
        shown=Shown(("", "precision"), place=SETTING, only_varying=True),
    ),
    Column(
        "zero_stage",
        "",
        "as configured",
        tasks=TRAIN,
        layout="parallel.zero_stage",
        asked=int,
        shown=Shown(("ZeRO", "stage"), place=SETTING, only_varying=True),
    ),
    Column(
        "activation_checkpointing",
        "",
        "as configured",
        tasks=TRAIN,
        layout="train.activation_checkpointing",
        asked=str,
        shown=Shown(("check-", "pointing"), place=SETTING, only_varying=True),
    ),
    Column(
        "step_seconds",
        "s",
        "wall time of an optimizer step (with `task=forward` of a forward pass of the global batch), which all ranks "
        "begin together, so that what is written down or saved between "
        "two steps is in neither: per step the maximum over ranks, then the median of the steps after warm-up; of a "
        "point measured several times the median of these medians",
        measured=lambda run: run.step_seconds,
        inferred=lambda run: _of_passes(run, lambda: median(run.seconds)),
        shown=Shown(("step", "ms"), scaled(1e3, digits=4)),
    ),
    Column(
        "step_seconds_p10",
        "s",
        "10th percentile of the same steps, of all repeats together",
        measured=lambda run: percentile(10)(run.seconds),
        inferred=lambda run: _of_passes(run, lambda: percentile(10)(run.seconds)),
        of_all_steps=percentile(10),
        shown=Shown(("p10-p90", "ms"), scaled(1e3), to="step_seconds_p90", dispensable=2),
    ),
    Column(
        "step_seconds_p90",
        "s",
        "90th percentile of the same steps, of all repeats together",
        measured=lambda run: percentile(90)(run.seconds),
        inferred=lambda run: _of_passes(run, lambda: percentile(90)(run.seconds)),
        of_all_steps=percentile(90),
    ),
    Column(
        "tokens_per_second",
        "1/s",
        "global_batch_size x sequence_length / step_seconds, with `task=generate` tokens that were generated / "
        "generation_seconds; of `padded` and `packed` documents the mean number of "
        "positions in a timed step that are no padding / step_seconds",
        measured=lambda run: run.tokens_per_second,
        inferred=lambda run: run.tokens_per_second,
        repeats=middle_rate,
        shown=Shown(("tokens", "/s"), scaled(1, digits=4)),
    ),
    Column(
        "tokens_per_second_per_device",
        "1/s",
        "tokens_per_second / world_size",
        measured=lambda run: run.tokens_per_second_per_device,
        inferred=lambda run: run.tokens_per_second / run.config.parallel.world_size,
        repeats=middle_rate,
        shown=Shown(("tokens/s", "/device"), scaled(1, digits=4)),
    ),
    Column(
        "model_tflops_per_device",
        "10^12/s",
        "FLOPs of the model's matrix products, forward and twice that for backward, with full attention (of a token to "
        "its own document); recomputation and padding are not counted",
        measured=lambda run: _in_tera(run.flops_per_second()),
        repeats=middle_rate,
        shown=Shown(("TFLOP/s", "/device"), scaled(1), dispensable=4),
    ),
    Column(
        "mfu",
        "",
        "model_tflops_per_device over the device's dense datasheet peak for the precision; empty for an unknown device",
        measured=lambda run: run.share_of(run.peak_flops_per_second),
        repeats=middle_rate,
        shown=Shown(("MFU", "%"), percent),
    ),
    Column(
        "gemm_utilization",
        "",
        "model_tflops_per_device over the largest matrix-product rate measured on this machine: of a rank while as "
        "many ranks, with the same threads, compute side by side for a tenth of a second, so that ranks that share a "
        "core share its rate",
        measured=lambda run: run.share_of(run.gemm_flops_per_second),
        repeats=middle_rate,
        shown=Shown(("of GEMM", "%"), percent, dispensable=3),
    ),
    Column(
        "bubble_fraction_ideal",
        "",
        "idle share of a pipeline of p equal stages with free transfers; (p-1)/(m+p-1) with 1F1B (arXiv 2104.04473)",
        tasks=PASSES,
        layout=ideal_bubble_fraction_of,
        shown=Shown(("bubble %", "ideal"), percent),
    ),
    Column(
        "bubble_fraction_measured",
        "",
        "1 - mean over stages of busy time / T; T from the first forward's start to the last backward's end; median "
        "over steps; moments of different hosts by clocks that are compared at the start and again after 1, 2, 4 ... "
        "and every 64 steps",
        measured=lambda run: run.bubble.fraction,
        inferred=lambda run: _of_passes(run, lambda: run.bubble("prefill", "measured")),
        shown=Shown(("bubble %", "measured"), percent),
    ),
    Column(
        "bubble_overhead_ideal",
        "",
        "the same bubble as bubble_fraction_ideal, over busy time; (p-1)/m with 1F1B",
        tasks=PASSES,
        layout=ideal_bubble_overhead_of,
    ),
    Column(
        "bubble_overhead_measured",
        "",
        "the same bubble as bubble_fraction_measured, over busy time",
        measured=lambda run: run.bubble.overhead,
        inferred=lambda run: _of_passes(run, lambda: _overhead(run.bubble("prefill", "measured"))),
    ),
    Column(
        "peak_memory_bytes",
        "bytes",
        "of the rank with most, over all steps; what building the model took before the first step is not in it, but "
        "where Linux does not let a process forget its peak (`/proc/self/clear_refs`)",
        measured=lambda run: largest([record.peak_memory_bytes for record in run.records]),
        inferred=lambda run: largest([record.peak_memory_bytes for record in run.records]),
        early=True,
        shown=Shown(("memory", "MiB"), scaled(2**-20), dispensable=1),
    ),
    Column(
        "first_loss",
        "",
        "mean over the tokens of the first global batch; `nan` or `inf` where training diverged, which is no failure "
        "of the measurement",
        measured=lambda run: run.records[0].loss,
        early=True,
    ),
    Column(
        "last_loss",
        "",
        "the same of the last global batch",
        measured=lambda run: run.records[-1].loss,
        early=True,
        shown=Shown(("last", "loss"), scaled(1, digits=4), dispensable=5),
    ),
    Column(
        "oversubscribed",
        "",
        "ranks x threads exceed the cores: the times compare with nothing but themselves",
        measured=lambda run: run.machine and is_oversubscribed(run.config, run.machine),
        inferred=lambda run: run.machine and is_oversubscribed(run.config, run.machine),
        early=True,
    ),
    Column(
        "wandb_run_id",
        "",
        "id of the run in wandb; empty until it is written",
        attempt=lambda tried: tried.attempt.wandb_run_id(),
    ),
    Column("command", "", "repeats the point", attempt=lambda tried: tried.attempt.command() or None),
    Column("attempt", "", "number of the attempt shown", attempt=lambda tried: tried.attempt.number, repeats=newest),
    Column(
        "stale",
        "",
        "measured with other versions, code or hardware than sweep.yaml names or, among single runs, than the run that "
        "ended last; such a row is not ranked",
        attempt=lambda tried: tried.is_stale,
    ),
    Column(
        "model",
        "",
        "label of the model",
        layout="model.name",
        asked=str,
        shown=Shown(("", "model"), place=MODEL, only_varying=True),
    ),
    Column(
        "num_parameters", "", "of the whole model, each counted once", layout=lambda config: parameters(config.model)
    ),
    Column(
        "partition",
        "",
        "layers per stage, or the rule for them",
        layout="parallel.partition",
        asked=str,
        shown=Shown(("", "partition"), place=STAGES, only_varying=True),
    ),
    Column(
        "threads_per_rank",
        "",
        "compute threads of a rank",
        layout="launch.threads_per_rank",
        asked=int,
        shown=Shown(("threads", "/rank"), place=SETTING, only_varying=True),
    ),
    Column(
        "model_tflops_per_device_causal",
        "10^12/s",
        "model_tflops_per_device with attention halved, as some tools count",
        measured=lambda run: _in_tera(run.flops_per_second(causal=True)),
        repeats=middle_rate,
    ),
    Column(
        "eval_loss",
        "",
        "on held-out text, as configured: of the last evaluation, or of a generation with "
        "`generate.perplexity_samples`; empty when there was none",
        measured=lambda run: run.eval_loss,
        inferred=lambda run: run.held_out and run.held_out.loss,
    ),
    Column(
        "eval_perplexity",
        "",
        "exp(eval_loss)",
        measured=lambda run: None if run.eval_loss is None else perplexity(run.eval_loss),
        inferred=lambda run: run.held_out and perplexity(run.held_out.loss),
    ),
    Column(
        "repeats",
        "",
        "attempts that count for this row: all that ended well with the versions, code and hardware of the one shown",
        attempt=lambda tried: 1 if tried.status["status"] == "ok" else None,
        repeats=sum,
    ),
    Column(
        "drift",
        "",
        "change of the median step from the first third of the timed steps to the last, as a share: 0.05 when steps "
        "became 5 % slower; 0 where it is within noise, 4 standard errors of the difference of the two medians; empty "
        "for fewer than 18 steps",
        measured=lambda run: drift(run.seconds),
    ),
    Column(
        "warmup_steps_detected",
        "steps",
        "before the first that takes at most the median of the last half of all steps plus 5 standard deviations (from "
        "the median absolute deviation) or 5 %; above `train.warmup_steps`, slow steps are in the timings",
        measured=lambda run: detect_warmup([record.step_seconds for record in run.records]),
    ),
    Column(
        "parity",
        "",
        "with `sweep.verify=true`: `pass` or `fail`, whether the layout computes what one rank does, or `unknown`, "
        "where the check did not finish (`reason` says why)",
        attempt=lambda tried: tried.parity.get("parity"),
    ),
    Column(
        "parity_max_error",
        "",
        "error of the parity check's comparison that is nearest to its tolerance, or furthest above it",
        attempt=lambda tried: tried.parity.get("parity_max_error"),
    ),
    Column("sequence_parallel", "", "as configured", tasks=TRAIN, layout="parallel.sequence_parallel"),
    Column("dropout", "", "as configured", tasks=TRAIN, layout="model.dropout"),
    Column(
        "bubble_fraction_simulated",
        "",
        "by a simulation of the schedule with the measured durations of each stage's forwards, backwards and "
        "transfers; mean over up to 10 timed steps",
        measured=lambda run: run.bubble_fraction_simulated,
        inferred=lambda run: _of_passes(run, lambda: run.bubble("prefill", "simulated")),
    ),
    Column(
        "checkpoint_interval",
        "steps",
        "between checkpoints, 0 for none; a point with checkpoints is another one than without",
        tasks=TRAIN,
        layout="train.checkpoint_interval",
        shown=Shown(("steps per", "checkpoint"), place=SETTING, only_varying=True),
    ),
    Column(
        "slots",
        "",
        "`launch.slots`, points of the sweep that ran at once; above 1 they shared the machine's memory bandwidth and "
        "disturbed each other, though each had cores or devices of its own. Such rows are ranked like the others",
        layout="launch.slots",
        asked=int,
        repeats=largest,
        shown=Shown(("points", "at once"), place=SETTING, only_varying=True),
    ),
    Column(
        "launch_gap_fraction_max",
        "",
        "at most this share of forward and backward time the GPUs waited for the host to launch their next kernel: for "
        "each instruction the time from its begin on the device until the host had launched all of it; median over "
        "steps, empty on CPU. Near 1 the host may be the limit, and busy time and bubble say little",
        measured=lambda run: _median_known([record.launch_gap_fraction for record in run.timed]),
    ),
    Column(
        "engine",
        "",
        "what trained",
        tasks=TRAIN,
        layout="parallel.engine",
        asked=str,
        shown=Shown(("", "engine"), place=SETTING, only_varying=True),
    ),
    Column(
        "num_chunks",
        "",
        "parts of the model on each stage",
        tasks=TRAIN,
        layout="parallel.num_chunks",
        asked=int,
        shown=Shown(("chunks", "/stage"), place=STAGES, only_varying=True),
    ),
    Column(
        "micro_batches_in_flight",
        "",
        "forward passes done whose backward pass is not, at most, on the stage with most; a pass of one of v chunks "
        "counts 1/v. So many times a stage holds the activations of a micro-batch",
        tasks=TRAIN,
        layout=lambda config: max(schedule_of(config).most_in_flight),
        shown=Shown(
            ("in", "flight"), "{:.3g}".format, place=STAGES, only_varying=True, among=("pp", "num_micro_batches")
        ),
    ),
    Column(
        "schedule_memory",
        "",
        "limit of micro_batches_in_flight over pp with zb_auto and zb_v",
        tasks=TRAIN,
        layout="parallel.schedule_memory",
        asked=float,
    ),
    Column(
        "transport",
        "",
        "what carried messages between ranks, with the axes (`tp`, `pp`, `dp`) where they differ: `nccl`, "
        "`shared memory` (ranks of one host without GPUs), or `gloo`, with the reason where memory can't be shared; "
        "empty for one rank",
        attempt=lambda tried: tried.result.get("transport"),
        shown=Shown(("", "transport"), place=SETTING, only_varying=True),
    ),
    Column(
        "compiled",
        "",
        "whether blocks trained through torch.compile: `yes`, `no` (`model.compile=false`), or which ranks computed "
        "without, where it failed, and why; of several repeats the first where it did",
        attempt=lambda tried: tried.result.get("compiled"),
        repeats=lambda values: next((value for value in values if value not in ("yes", "no")), values[-1]),
        shown=Shown(("", "compiled"), lambda outcome: outcome.split()[0], place=SETTING, only_varying=True),
    ),
    Column(
        "compile_seconds",
        "s",
        "from the begin of compilation to the end of a block's first passes, forward and backward, on the rank that "
        "took longest; before the first step, and less where torch's cache has what was compiled; empty without",
        measured=lambda run: run.compiled and run.compiled.seconds,
        early=True,
        shown=Shown(("compile", "s"), scaled(1), dispensable=1),
    ),
    Column(
        "matrix_products",
        "",
        "what computed fp32 matrix products of rank 0's layers on a CPU: `onednn`, at least the larger ones "
        "(`model.onednn`), or `torch`, which takes the library it always takes, as it does for other precisions and on "
        "GPUs",
        attempt=lambda tried: tried.result.get("matrix_products"),
        shown=Shown(("matrix", "products"), place=SETTING, only_varying=True),
    ),
    Column(
        "objective",
        "",
        "what is predicted: the next token (`causal`) or tokens that were masked (`masked`)",
        tasks=TRAIN,
        layout="train.objective",
        asked=str,
        shown=Shown(("", "objective"), place=SETTING, only_varying=True),
    ),
    Column(
        "documents",
        "",
        "how samples are made of documents",
        tasks=TRAIN,
        layout="data.documents",
        asked=str,
        shown=Shown(("", "documents"), place=SETTING, only_varying=True),
    ),
    Column(
        "padding_fraction",
        "",
        "share of the positions of the timed steps that are padding; empty where there can be none",
        measured=lambda run: run.padding_fraction,
        shown=Shown(("padding", "%"), percent, place=SETTING),  # beside tokens per second
    ),
    Column(
        "task",
        "",
        "what was run: `train`; `generate`: sequences; `forward`: forward passes alone",
        layout="task",
        asked=str,
        shown=Shown(("", "task"), place=MODEL, only_varying=True, among=()),
    ),
    Column(
        "part",
        "",
        "of the model, that was run: all of it (`model`), or one transformer `layer`",
        layout="model.part",
        asked=str,
        shown=Shown(("", "part"), place=MODEL, only_varying=True, among=()),
    ),
    Column(
        "batch_size",
        "sequences",
        "that are worked on at a time, at most",
        tasks=GENERATE,
        layout="generate.batch_size",
        asked=int,
        shown=Shown(("", "batch"), place=LAYOUT),
    ),
    Column(
        "num_groups",
        "",
        "of sequences that go round the stages",
        tasks=GENERATE,
        layout=_num_groups,
        shown=Shown(("", "groups"), place=LAYOUT),
    ),
    Column(
        "prompt_length",
        "tokens",
        "of each prompt; empty where prompts were given",
        tasks=GENERATE,
        layout=lambda config: None if gives_prompts(config) else config.generate.prompt_length,
        shown=Shown(("prompt", "length"), place=SETTING, only_varying=True, among=()),
    ),
    Column(
        "max_new_tokens",
        "tokens",
        "after which a sequence ends",
        tasks=GENERATE,
        layout="generate.max_new_tokens",
        asked=int,
        shown=Shown(("new", "tokens"), place=SETTING, only_varying=True, among=()),
    ),
    Column(
        "quantization",
        "",
        "of weights: `none` or `int8`",
        tasks=INFERENCE,
        layout="generate.quantization",
        asked=str,
        shown=Shown(("quanti-", "zation"), place=SETTING, only_varying=True, among=()),
    ),
    Column(
        "request_rate",
        "1/s",
        "at which requests were offered; empty where they came all at once",
        tasks=GENERATE,
        layout="generate.request_rate",
        asked=float,
        shown=Shown(("requests", "/s"), scaled(1), place=SETTING, only_varying=True, among=()),
    ),
    Column(
        "generation_seconds",
        "s",
        "wall time of a measurement, from the first offer of a request to the last token; prefill and decode added "
        "where they were measured one after the other; the median of `generate.repeats`",
        inferred=lambda run: _of_sequences(run, lambda: median(run.seconds)),
        shown=Shown(("all", "s"), scaled(1, digits=4)),
    ),
    Column(
        "generation_seconds_p10",
        "s",
        "10th percentile of the same measurements, of all repeats together",
        inferred=lambda run: _of_sequences(run, lambda: percentile(10)(run.seconds)),
        of_all_steps=percentile(10),
        shown=Shown(("p10-p90", "s"), scaled(1), to="generation_seconds_p90", dispensable=2),
    ),
    Column(
        "generation_seconds_p90",
        "s",
        "90th percentile of the same measurements, of all repeats together",
        inferred=lambda run: _of_sequences(run, lambda: percentile(90)(run.seconds)),
        of_all_steps=percentile(90),
    ),
    Column(
        "prefill_tokens_per_second",
        "1/s",
        "tokens of prompts over the time in which they, and nothing else, were computed; empty where sequences entered "
        "while others went on",
        inferred=lambda run: _of_sequences(run, lambda: run.rate("prefill")),
        repeats=middle_rate,
        shown=Shown(("prefill", "tok/s"), scaled(1, digits=4)),
    ),
    Column(
        "decode_tokens_per_second",
        "1/s",
        "tokens of all sequences after their first ones, over the time in which these, and nothing else, were computed",
        inferred=lambda run: _of_sequences(run, lambda: run.rate("decode")),
        repeats=middle_rate,
        shown=Shown(("decode", "tok/s"), scaled(1, digits=4)),
    ),
    Column(
        "time_to_first_token_seconds",
        "s",
        "from the offer of a request to the moment its first token is chosen: the median of all",
        inferred=lambda run: run.percentile("first_token_seconds", 50),
        shown=Shown(("first tok", "p50 ms"), scaled(1e3)),
    ),
    Column(
        "time_to_first_token_seconds_p99",
        "s",
        "the 99th percentile of the same",
        inferred=lambda run: run.percentile("first_token_seconds", 99),
        shown=Shown(("first tok", "p99 ms"), scaled(1e3), dispensable=1),
    ),
    Column(
        "inter_token_seconds_p50",
        "s",
        "from one token of a sequence to its next, as they are chosen: the median of all; not from the first to the "
        "second where prefill and decode were measured one after the other",
        inferred=lambda run: run.percentile("inter_token_seconds", 50),
        shown=Shown(("next tok", "p50 ms"), scaled(1e3)),
    ),
    Column(
        "inter_token_seconds_p99",
        "s",
        "the 99th percentile of the same",
        inferred=lambda run: run.percentile("inter_token_seconds", 99),
        shown=Shown(("next tok", "p99 ms"), scaled(1e3), dispensable=1),
    ),
    Column(
        "queue_seconds_p50",
        "s",
        "from the offer of a request to the begin of its first pass: the median of all",
        inferred=lambda run: run.percentile("queue_seconds", 50),
        shown=Shown(("queue", "p50 ms"), scaled(1e3), dispensable=2),
    ),
    Column(
        "queue_seconds_p99",
        "s",
        "the 99th percentile of the same",
        inferred=lambda run: run.percentile("queue_seconds", 99),
        shown=Shown(("queue", "p99 ms"), scaled(1e3), dispensable=2),
    ),
    Column(
        "kv_cache_bytes",
        "bytes",
        "of keys and values on the rank with most; result.json has them by rank, beside those that were predicted",
        inferred=lambda run: _of_sequences(run, lambda: run.kv_cache_bytes),
        shown=Shown(("KV cache", "MiB"), scaled(2**-20), dispensable=2),
    ),
    *(
        Column(
            f"{phase}_bubble_fraction_{kind}",
            "",
            meaning,
            tasks=GENERATE,
            layout=partial(ideal_bubble_of, phase=phase) if kind == "ideal" else None,
            inferred=None if kind == "ideal" else partial(_bubble_of, phase=phase, kind=kind),
            shown=NOT_SHOWN if kind == "simulated" else Shown((f"{phase} bubble", f"% {kind}"), percent, dispensable=3),
        )
        for phase, what in PHASES.items()
        for kind, meaning in (
            ("ideal", f"idle share of equal stages with free transfers while {what} are computed"),
            ("simulated", "the same with the measured mean durations of stages and transfers"),
            ("measured", "idle share of the stages, from the first forward's start to the last one's end, median"),
        )
    ),
    Column(
        "speedup",
        "",
        "without training: tokens_per_second over that of the sweep's row of one rank with the same settings but the "
        "layout (on CPU also with as many threads per rank); known as results.csv is written, empty where there is no "
        "such row, or requests came at a rate",
        compared=_times("tokens_per_second"),
        shown=Shown(("all", "x"), scaled(1), place=COMPARED),
    ),
    Column(
        "efficiency",
        "",
        "speedup / world_size",
        compared=_efficiency,
        shown=Shown(("efficiency", "%"), percent, place=COMPARED),
    ),
    *(
        Column(name, "", meaning, compared=_times(of, is_rate), shown=Shown(header, scaled(1), place=COMPARED))
        for name, header, of, is_rate, meaning in (
            ("prefill_speedup", ("prefill", "x"), "prefill_tokens_per_second", True, "the same of prefill"),
            ("decode_speedup", ("decode", "x"), "decode_tokens_per_second", True, "the same of decode"),
            (
                "time_to_first_token_speedup",
                ("first tok", "x"),
                "time_to_first_token_seconds",
                False,
                "that of the one rank over time_to_first_token_seconds: how many times sooner",
            ),
            (
                "inter_token_speedup",
                ("next tok", "x"),
                "inter_token_seconds_p50",
                False,
                "that of the one rank over inter_token_seconds_p50",
            ),
        )
    ),
    Column(
        "eval_perplexity_fp32",
        "",
        "of a generation with the same weights on the same text in fp32 without quantization, beside eval_perplexity",
        inferred=lambda run: run.held_out and perplexity(run.held_out.loss_fp32),
    ),
)
"""In the order of results.csv: people script against names and order, so new ones go to the end."""


def _median_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


# --- what follows from the table


def names() -> list[str]:
    """Of all columns, in their order."""
    return [column.name for column in COLUMNS]


def layout_columns(config: RunConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Columns known before any run.

    Args:
        config: plain containers where it is none that can run: then what it says where that makes sense, and nothing
            derived.
    """
    if isinstance(config, RunConfig):
        known = [column for column in COLUMNS if config.task in column.tasks]
        return {column.name: _known(column.layout, config) for column in known if column.layout}
    task = config.get("task", "train")
    known = [column for column in COLUMNS if column.asked and task in column.tasks]
    asked = {column: _asked_for(column.layout, config) for column in known}
    return {column.name: value for column, value in asked.items() if isinstance(value, column.asked or ())}


def _known(layout: str | Callable[[RunConfig], Any], config: RunConfig) -> Any:
    if callable(layout):
        return layout(config)
    value: Any = reduce(getattr, layout.split("."), config)
    return str(value) if isinstance(value, list) else value


def _asked_for(layout: Any, raw: Any) -> Any:
    """The value of a dotted key in plain containers; None where there is none."""
    for part in layout.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def measured_columns(run: MeasuredRun) -> dict[str, Any]:
    """Columns that a run measured: nothing before its first step, all from its first timed one on."""
    known = [column for column in COLUMNS if run.timed or (run.records and column.early)]
    return {column.name: column.measured(run) for column in known if column.measured}


def inferred_columns(run: MeasuredInference) -> dict[str, Any]:
    """Columns that an inference measured: before its first measurement that counts, only what says nothing of it."""
    known = [column for column in COLUMNS if run.records or column.early]
    return {column.name: column.inferred(run) for column in known if column.inferred}


def attempt_columns(tried: Tried) -> dict[str, Any]:
    """Columns that say what became of an attempt."""
    return {column.name: column.attempt(tried) for column in COLUMNS if column.attempt}


def compared_columns(row: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that compare a row with that of one rank."""
    return {column.name: column.compared(row, one) for column in COLUMNS if column.compared}


def readme_table() -> str:
    """The table in results/README.md."""
    lines = [f"| `{column.name}` | {column.unit} | {column.meaning} |" for column in COLUMNS]
    return "\n".join(["| column | unit | meaning |", "| --- | --- | --- |", *lines])


if __name__ == "__main__":
    print(readme_table())
