"""The table a single run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.record.columns import layout_columns, number
from harness.record.spread import LARGE_DRIFT
from harness.spans.accounting import PART_LABELS
from harness.spec.config import RunConfig

if TYPE_CHECKING:
    from rich.table import Table


def print_summary(config: RunConfig, result: dict[str, Any]) -> None:
    """Print stages, times and the bubble of a finished run.

    Args:
        result: content of result.json.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.model.name}  {config.slug}  m={config.num_micro_batches}")
    for heading in ("stage", "layers", "parameters", "forward GFLOP", "forward ms", "backward ms"):
        table.add_column(heading, justify="right")
    for stage in result["stages"] or ():
        table.add_row(
            str(stage["stage"]),
            str(stage["layers"]),
            f"{stage['parameters']:,}",
            f"{stage['forward_flops'] / 1e9:.3g}",
            f"{stage['forward_seconds'] * 1e3:.1f}",
            f"{stage['backward_seconds'] * 1e3:.1f}",
        )
    accounting = _accounting_table(result.get("accounting"))
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print("Per micro-batch; FLOPs and parameters over all tensor-parallel ranks of a stage.", style="dim")
    if accounting is not None:
        console.print(accounting)
    for line in summary_lines(config, layout_columns(config) | result["row"] | {"compiled": result.get("compiled")}):
        console.print(line, highlight=False)
        if line.startswith("bubble"):
            for detail in bubble_lines(result.get("bubble")):
                console.print(detail, highlight=False)
    for sentence in result.get("missing", ()):
        console.print(f"missing: {sentence}", markup=False, highlight=False, soft_wrap=True, style="yellow")


def print_inference(config: RunConfig, result: dict[str, Any]) -> None:
    """Print what a run without training measured.

    Args:
        result: content of result.json.
    """
    for line in [*inference_lines(config, result["row"]), *perplexity_lines(config, result)]:
        print(line, flush=True)
    cache = result["kv_cache_bytes"]
    if any(cache["predicted"]):
        by_rank = ", ".join(f"{size:,}" for size in cache["measured"])
        verdict = "as predicted" if cache["measured"] == cache["predicted"] else f"predicted {cache['predicted']}"
        print(f"KV cache    {by_rank} bytes by rank, {verdict}", flush=True)


def inference_lines(config: RunConfig, row: Mapping[str, Any]) -> list[str]:
    """The figures of a run without training in sentences; what is not known is left out."""
    lines, row = [], {**layout_columns(config), **row}

    def say(name: str, text: str, *needed: str) -> None:
        if all(row.get(key) is not None for key in needed):
            lines.append(f"{name:<12}{text.format(**row)}")

    say("latency", "{step_seconds:.4g} s of a forward pass, {tokens_per_second:,.0f} tokens/s", "step_seconds")
    say("bubble", _bubble_text("bubble_fraction", row), "bubble_fraction_measured")
    for phase in ("prefill", "decode"):
        bubble, rate = f"{phase}_bubble_fraction", f"{phase}_tokens_per_second"
        say(phase, f"{{{rate}:,.1f}} tokens/s, bubble {_bubble_text(bubble, row)}", rate, f"{bubble}_measured")
    say(
        "all", "{tokens_per_second:,.1f} tokens/s generated, {generation_seconds:.3g} s from first offer to last token",
        "generation_seconds",
    )  # fmt: skip
    first = _duration(row.get("time_to_first_token_seconds"))
    say("first token", f"{first} after its request, the median", "time_to_first_token_seconds")
    half, most = (_duration(row.get(f"inter_token_seconds_{share}")) for share in ("p50", "p99"))
    say("next token", f"{half} after the one before, 99 % within {most}", "inter_token_seconds_p50")
    if row.get("oversubscribed"):
        lines.append("oversubscribed: more ranks x threads than cores, so these times compare only with themselves")
    return lines


def _duration(seconds: float | None) -> str:
    """In milliseconds below a second."""
    seconds = seconds or 0.0
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds, 4)} ms"


def _bubble_text(bubble: str, row: Mapping[str, Any]) -> str:
    """The measured one, and beside it what it would be, as far as that is known."""
    kinds = [kind for kind in ("measured", "simulated", "ideal") if row.get(f"{bubble}_{kind}") is not None]
    return ", ".join(f"{row[f'{bubble}_{kind}']:z.1%} {kind}" for kind in kinds)


def perplexity_lines(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    """What rounding does to the perplexity of held-out text, in one sentence; none where it was not measured.

    Args:
        result: content of result.json.
    """
    if (held_out := result.get("held_out")) is None:
        return []
    found, exact = (number(result["row"][key], 5) for key in ("eval_perplexity", "eval_perplexity_fp32"))
    how = [
        *(["with int8"] if config.generate.quantization == "int8" else []),
        *([f"in {config.train.precision}"] if config.train.precision != "fp32" else []),
    ]
    said = [*([f"{found} {' '.join(how)}"] if how else []), f"{exact} in fp32"]
    text = f"(held-out: {held_out['num_tokens']:,} tokens of {held_out['source']})"
    return [f"perplexity  {', '.join(said)} {text}"]


def _accounting_table(accounting: list[dict[str, Any]] | None) -> Table | None:
    """Milliseconds of a step by stage; parts that no stage has are left out."""
    from rich.table import Table
    from rich.text import Text

    if not accounting:
        return None
    table = Table(title="milliseconds of a step")
    for heading in ("part", *(f"stage {stage['stage']}" for stage in accounting)):
        table.add_column(heading, justify="right")
    for part, label in PART_LABELS.items():
        if any(stage["seconds"][part] for stage in accounting):
            table.add_row(label, *(f"{stage['seconds'][part] * 1e3:.1f}" for stage in accounting))
    residuals = [f"{100 * stage['residual_seconds'] / stage['step_seconds']:+.2f}%" for stage in accounting]
    colours = ["" if stage["closes"] else "bold red" for stage in accounting]
    table.add_row("residual", *map(Text, residuals, colours))
    table.add_row("step", *(f"{stage['step_seconds'] * 1e3:.1f}" for stage in accounting))
    return table


def bubble_lines(bubble: dict[str, Any] | None) -> list[str]:
    """What the bubble would be and what it consists of; nothing where no step was looked into."""
    if bubble is None:
        return []
    wait = bubble["replica_wait_seconds"]
    causes = ", ".join(f"{cause} {percent:z.1f}%" for cause, percent in bubble["causes_percent"].items())
    return [
        f"            {bubble['simulated']['fraction']:z.1%} simulated from the measured durations",
        f"            {causes}",
        *([] if wait is None else [f"            {wait * 1e3:.1f} ms a replica waits for the latest, besides"]),
    ]


def summary_lines(config: RunConfig, row: dict[str, Any]) -> list[str]:
    """The run's figures in sentences; what is not known is left out."""
    model_flops = ""
    if row["model_tflops_per_device"] is not None:
        model_flops = f", {row['model_tflops_per_device']:.3g} model TFLOP/s per device"
    lines = [
        f"step        {row['step_seconds'] * 1e3:.1f} ms median"
        f" (p10 {row['step_seconds_p10'] * 1e3:.1f}, p90 {row['step_seconds_p90'] * 1e3:.1f})",
        f"throughput  {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['tokens_per_second_per_device']:,.0f} per device{model_flops}",
        f"bubble      {row['bubble_fraction_measured']:z.1%} of the pipeline's time measured, "
        f"{row['bubble_fraction_ideal']:.1%} ideal for {config.parallel.schedule}",
        f"memory      {row['peak_memory_bytes'] / 2**20:,.0f} MiB peak of the largest rank",
        f"loss        {row['first_loss']:.4f} to {row['last_loss']:.4f}",
    ]
    if row["eval_loss"] is not None:
        lines.append(f"held out    loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:,.1f}")
    if row["gemm_utilization"] is not None:
        lines.insert(2, f"efficiency  {row['gemm_utilization']:.1%} of this machine's matrix-product rate")
    if row["mfu"] is not None:
        lines.insert(2, f"MFU         {row['mfu']:.1%} of the device's datasheet peak")
    if row.get("launch_gap_fraction_max") is not None:
        share = row["launch_gap_fraction_max"]
        lines.append(f"launches    at most {share:.0%} of forward and backward the GPUs waited for the host")
    if abs(row["drift"] or 0) >= LARGE_DRIFT:
        lines.append(
            f"drift       {row['drift']:+.1%} from the first to the last third of the timed steps, beyond noise"
        )
    if (row["warmup_steps_detected"] or 0) > config.train.warmup_steps:
        lines.append(
            f"warm-up     the first {row['warmup_steps_detected']} steps are slow, and "
            f"train.warmup_steps={config.train.warmup_steps} of them are left out"
        )
    if row.get("compile_seconds") is not None:
        lines.append(f"compiled    {row['compiled']}, {row['compile_seconds']:.1f} s before the first step")
    if row["oversubscribed"]:
        lines.append("oversubscribed: more ranks x threads than cores, so these times compare only with themselves")
    return lines
