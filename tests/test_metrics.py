"""Columns and lines of a run against numbers computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from helpers import MACHINE, inference_records, make_config, record_attempt, record_inference, step_records

from harness.corpus import prepare_corpus
from harness.machine import Machine
from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.model.weights import initialize
from harness.plan.hardware import peak_flops_per_second
from harness.record.columns import inferred_columns, layout_columns, measured_columns, names
from harness.record.inference import MeasuredInference, inference_line, inference_record_of
from harness.record.rows import point_row, row
from harness.record.sources import Compiled, MeasuredRun, flops_beside_peers, is_oversubscribed
from harness.record.steps import metrics_line, record_of
from harness.record.store import Point, SweepDirectory, environment, write_json
from harness.record.summary import inference_lines
from harness.run.data import CorpusSamples
from harness.run.engines.deepspeed.settings import build_deepspeed_config
from harness.spans.span import Bubble
from harness.spec.counts import training_flops_per_token

CONTRACT = """point, status, reason, tp, pp, dp, world_size, schedule, micro_batch_size, num_micro_batches,
global_batch_size, sequence_length, precision, zero_stage, activation_checkpointing, step_seconds, step_seconds_p10,
step_seconds_p90, tokens_per_second, tokens_per_second_per_device, model_tflops_per_device, mfu, gemm_utilization,
bubble_fraction_ideal, bubble_fraction_measured, bubble_overhead_ideal, bubble_overhead_measured, peak_memory_bytes,
first_loss, last_loss, oversubscribed, wandb_run_id, command""".replace("\n", " ").split(", ")

# gpt2_tiny: 4 blocks of hidden 256, sequence 128, vocabulary 256. Per token and block: 2*256*768 (q, k, v)
# + 2*256*256 (output) + 4*128*256 (attention) + 2*2*256*1024 (feed-forward) = 1703936; head 2*256*256 = 131072.
FLOPS_PER_TOKEN = 3 * (4 * 1703936 + 131072)
CAUSAL_FLOPS_PER_TOKEN = FLOPS_PER_TOKEN - 3 * 4 * (4 * 128 * 256) // 2


def test_contract_columns_come_first() -> None:
    assert names()[: len(CONTRACT)] == CONTRACT
    assert len(set(names())) == len(names())


def test_layout_columns() -> None:
    columns = layout_columns(make_config("parallel.pp=2", "parallel.tp=1", "train.micro_batch_size=2"))
    assert columns | {
        "tp": 1, "pp": 2, "dp": 1, "world_size": 2, "schedule": "1f1b", "micro_batch_size": 2,
        "num_micro_batches": 4, "global_batch_size": 8, "sequence_length": 128, "precision": "fp32",
        "zero_stage": 0, "activation_checkpointing": "none", "bubble_fraction_ideal": 1 / 5,
        "bubble_overhead_ideal": 1 / 4, "model": "gpt2_tiny", "num_parameters": 3487232,
        "partition": "uniform", "threads_per_rank": 1, "sequence_parallel": False, "dropout": 0.0,
        "checkpoint_interval": 0, "slots": 1, "engine": "deepspeed",
    } == columns  # fmt: skip
    assert set(columns) <= set(names())


def test_line_has_the_keys_of_the_contract() -> None:
    config, record = make_config(), step_records([0.5])[0]
    assert metrics_line(record, config) == {
        "step": 1,
        "train/loss": 4.9,
        "train/learning_rate": 1e-3,
        "train/grad_norm": None,
        "perf/step_seconds": 0.5,
        "perf/tokens_per_second": 8 * 128 / 0.5,
        "perf/bubble_fraction": 0.25,
        "memory/peak_bytes": 2**20,
    }


def test_a_step_can_be_read_back_from_its_line() -> None:
    record = replace(step_records([0.5])[0], grad_norm=0.25, eval_loss=3.0)
    line = json.loads(json.dumps(metrics_line(record, make_config())))
    assert record_of(line) == replace(
        record, forward_seconds=[], backward_seconds=[], bubble=Bubble(0.25, pytest.approx(1 / 3), 0.125)
    )


def test_summary_by_hand() -> None:
    # Two slow warm-up steps, then 0.1 to 1.0 s and one of 5.1 s: median 0.6 (mean 0.96), and with 11 values p10 and
    # p90 are the second of each end. The bubbles' median is 0.25 too, their mean is not.
    seconds = [9.0, 9.0, 0.3, 0.2, 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 0.9, 5.1]
    records = [replace(record, eval_loss=3.0 if record.step == 6 else None) for record in step_records(seconds)]
    records[-1] = replace(records[-1], eval_loss=2.0, bubble=Bubble(0.75, 3.0, 3.8))
    records[-2] = replace(records[-2], peak_memory_bytes=2**30)
    gaps = [0.9, 0.9, *(0.1 * number for number in range(11))]  # of the warm-up, then 0 to 1
    records = [replace(record, launch_gap_fraction=gap) for record, gap in zip(records, gaps, strict=True)]
    summary = measured_columns(
        MeasuredRun(
            make_config("parallel.tp=2", "parallel.pp=2", "parallel.dp=4"), records, MACHINE,
            gemm_flops_per_second=1e11, peak_flops_per_second=1e12, bubble_fraction_simulated=0.125,
                compiled=Compiled(3.5, "yes"),
        )
    )  # fmt: skip
    tokens_per_second_per_device = 8 * 128 / 0.6 / (2 * 2 * 4)
    assert summary == pytest.approx({
        "step_seconds": 0.6,
        "step_seconds_p10": 0.2,
        "step_seconds_p90": 1.0,
        "tokens_per_second": 8 * 128 / 0.6,
        "tokens_per_second_per_device": tokens_per_second_per_device,
        "model_tflops_per_device": tokens_per_second_per_device * FLOPS_PER_TOKEN / 1e12,
        "model_tflops_per_device_causal": tokens_per_second_per_device * CAUSAL_FLOPS_PER_TOKEN / 1e12,
        "mfu": tokens_per_second_per_device * FLOPS_PER_TOKEN / 1e12,
        "gemm_utilization": tokens_per_second_per_device * FLOPS_PER_TOKEN / 1e11,
        "bubble_fraction_measured": 0.25,
        "bubble_overhead_measured": 1 / 3,
        "peak_memory_bytes": 2**30,
        "first_loss": 4.9,
        "last_loss": 3.7,
        "oversubscribed": True,
        "eval_loss": 2.0,
        "eval_perplexity": 7.38905609893065,
        "launch_gap_fraction_max": 0.5,
        "bubble_fraction_simulated": 0.125,
        "drift": None,
        "compile_seconds": 3.5,
        "warmup_steps_detected": 2,
        "padding_fraction": None,
    })  # fmt: skip
    assert set(summary) <= set(names())
    json.dumps(summary)  # plain numbers


def test_padding_is_no_throughput() -> None:
    """Documents of 100 tokens each in rows of 128, 800 of 1024 positions in a step; attention to 100 tokens."""
    config = make_config("data.documents=padded")
    flops, causal_flops = (800 * training_flops_per_token(config.model, 100, causal) for causal in (False, True))
    load = {"tokens": 800, "pairs": 8 * 100**2, "flops": flops, "causal_flops": causal_flops}
    records = [replace(record, **load) for record in step_records([9.0, 9.0, 0.5, 0.5])]
    run = MeasuredRun(config, records, MACHINE)
    assert run.tokens_per_second == 800 / 0.5
    assert run.padding_fraction == 1 - 800 / 1024
    assert run.attended_length == 100
    assert run.flops_per_second() == flops / 0.5
    assert run.flops_per_second(causal=True) == causal_flops / 0.5
    line = metrics_line(records[0], config)
    assert (line["data/tokens"], line["data/pairs"], line["perf/tokens_per_second"]) == (800, 80_000, 800 / 9)
    assert record_of(line) == replace(records[0], forward_seconds=[], backward_seconds=[])


def test_the_datasheet_is_read_for_the_precision_of_the_run() -> None:
    h100 = Machine("cuda", "NVIDIA H100 80GB HBM3", num_devices=8, num_cores=64, memory_bytes=2**40)
    for precision, peak in {"fp32": 67.0e12, "bf16": 989.4e12}.items():
        config = make_config("cluster=dgx_h100", f"train.precision={precision}", machine=h100)
        assert peak_flops_per_second(config, h100) == peak
    assert peak_flops_per_second(make_config(), MACHINE) is None


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """metrics.jsonl of a run whose second rank is slow and large."""
    argument = {"runs": [["run", RUN]], "slow_seconds": 0.5, "large_bytes": 2**30}
    (lines,) = run_ranks(2, "ranks_train", argument, tmp_path_factory.mktemp("run"))
    assert len(lines) == 4
    return lines  # type: ignore[no-any-return]


RUN = [
    "parallel.dp=2", "train.steps=4", "train.sequence_length=16", "data.kind=synthetic", "train.learning_rate=0.2",
    "train.learning_rate_warmup_steps=2", "train.learning_rate_decay=constant", "train.gradient_clipping=0.1",
]  # fmt: skip


def test_a_step_takes_as_long_as_its_slowest_rank_and_as_much_memory_as_its_largest(
    lines: list[dict[str, Any]],
) -> None:
    assert min(line["perf/step_seconds"] for line in lines) >= 0.5
    assert min(line["memory/peak_bytes"] for line in lines) >= 2**30


def test_a_run_records_the_loss_and_norm_of_torch(lines: list[dict[str, Any]]) -> None:
    """Of the first step, from the same fresh weights and samples, in float64; learning rates by hand."""
    config, single = make_config(*RUN), TensorParallel.single()
    model = build_layers(config.model, single).double()
    initialize(model.named_parameters(), config.model, single, config.train.seed)
    samples = CorpusSamples(config, prepare_corpus(config.data, config.model.vocab_size, 16))
    rows = [samples.sample(0, number) for number in range(8)]
    tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    logits = model(tokens)[..., : config.model.vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert lines[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert lines[0]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([0.1, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(("precision", "zero_stage", "dtype"), [("bf16", 0, "bf16"), ("bf16", 1, "fp32")])
def test_gradients_of_micro_batches_add_up_in(precision: str, zero_stage: int, dtype: str) -> None:
    config = make_config(f"train.precision={precision}", f"parallel.zero_stage={zero_stage}")
    assert build_deepspeed_config(config)["data_types"] == {"grad_accum_dtype": dtype}


def test_conventions_of_peers_are_rates_too() -> None:
    rates = flops_beside_peers(make_config(), 1000.0, 1e11)
    assert rates["shardwright"] == pytest.approx(
        {"tflops_per_device": FLOPS_PER_TOKEN / 1e9, "mfu": FLOPS_PER_TOKEN / 1e8}
    )
    assert {"megatron_lm", "palm", "torchtitan"} < set(rates)
    assert flops_beside_peers(make_config(), 1000.0, None)["palm"]["mfu"] is None


def test_percentiles_interpolate() -> None:
    summary = measured_columns(MeasuredRun(make_config("train.warmup_steps=0"), step_records([1.0, 2.0]), MACHINE))
    assert (summary["step_seconds_p10"], summary["step_seconds"], summary["step_seconds_p90"]) == (1.1, 1.5, 1.9)


def test_warm_up_counts_steps_of_this_launch() -> None:
    records = [type(record)(**{**vars(record), "step": record.step + 100}) for record in step_records([5.0, 5.0, 1.0])]
    summary = measured_columns(MeasuredRun(make_config(), records, MACHINE))
    assert summary["step_seconds"] == summary["step_seconds_p10"] == summary["step_seconds_p90"] == 1.0


def test_drift_leaves_warm_up_out() -> None:
    def found(steps: list[float]) -> float | None:
        return measured_columns(MeasuredRun(make_config(), step_records([5.0, 5.0, *steps]), MACHINE))["drift"]  # type: ignore[no-any-return]

    assert found([1.0] * 9 + [1.2] * 8) is None  # too few
    assert found([1.0] * 9 + [1.2] * 9) == pytest.approx(0.2)


def test_what_is_not_known_is_none() -> None:
    records = [type(r)(**{**vars(r), "peak_memory_bytes": None}) for r in step_records([1.0, 1.0, 1.0])]
    summary = measured_columns(MeasuredRun(make_config(), records, MACHINE))
    assert summary["mfu"] is summary["gemm_utilization"] is summary["peak_memory_bytes"] is None


def test_a_loss_that_diverged_is_no_unknown() -> None:
    records = [type(r)(**{**vars(r), "loss": math.nan}) for r in step_records([1.0, 1.0, 1.0])]
    summary = measured_columns(MeasuredRun(make_config(), records, MACHINE))
    assert math.isnan(summary["last_loss"])


def test_oversubscribed_counts_threads_on_cpu_only() -> None:
    two, one = make_config("parallel.tp=2"), make_config()
    assert not is_oversubscribed(two, MACHINE)
    assert is_oversubscribed(make_config("parallel.tp=2", "launch.threads_per_rank=2"), MACHINE)
    assert is_oversubscribed(make_config("parallel.tp=2", "parallel.pp=2"), MACHINE)
    assert not is_oversubscribed(one, MACHINE)
    gpus = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 1, 2**30)
    assert not is_oversubscribed(make_config("parallel.tp=8", machine=gpus), gpus)


class TestRow:
    def test_of_a_measured_attempt(self, tmp_path: Path) -> None:
        attempt = record_attempt(SweepDirectory(tmp_path, "grid"), "parallel.pp=2", identity="0123abcd")
        found = row(attempt, environment(MACHINE))
        assert set(found) == set(names())
        assert (found["point"], found["attempt"]) == ("tp1_pp2_dp1_mbs1_0123abcd", 1)
        assert (found["status"], found["reason"], found["stale"], found["mfu"]) == ("ok", None, False, None)
        assert found["step_seconds"] == pytest.approx(0.1)
        assert found["command"] == "deepspeed --num_gpus 2 launchers/train.py"
        write_json(attempt.wandb_file, {"run_id": "abc"})
        assert row(attempt)["wandb_run_id"] == "abc"
        assert row(attempt)["stale"] is None
        assert row(attempt, {"code": "another"})["stale"] is True

    def test_of_a_failed_attempt_tells_its_layout(self, tmp_path: Path) -> None:
        failed = record_attempt(
            SweepDirectory(tmp_path, "grid"), "parallel.tp=2", "parallel.pp=2", status="oom", reason="too big"
        )
        found = row(failed)
        assert (found["status"], found["reason"], found["tp"], found["world_size"]) == ("oom", "too big", 2, 4)
        assert found["oversubscribed"] is True
        assert found["step_seconds"] is None  # it was warming up
        assert found["last_loss"] == pytest.approx(4.8)

    def test_of_a_refused_point_tells_what_was_asked(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        overrides = ["parallel.tp=3", "parallel.dp=fill", "train.micro_batch_size=[1]", "train.precision=bf16"]
        found = row(sweep.record_invalid(overrides, None, "no", "python launchers/train.py parallel.tp=3"))
        assert (found["status"], found["reason"], found["tp"], found["precision"]) == ("invalid", "no", 3, "bf16")
        assert found["command"] == "python launchers/train.py parallel.tp=3"
        assert found["dp"] is found["micro_batch_size"] is found["world_size"] is None

    def test_of_a_refused_point_whose_types_are_right(self, tmp_path: Path) -> None:
        raw = make_config().model_dump(mode="json")
        raw["parallel"]["schedule"] = "none_of_ours"
        found = row(SweepDirectory(tmp_path, "grid").record_invalid(["a=1"], raw, "no", "x"))
        assert (found["schedule"], found["tp"], found["bubble_fraction_ideal"]) == ("none_of_ours", 1, None)

    def test_survives_damage(self, tmp_path: Path) -> None:
        attempt = record_attempt(SweepDirectory(tmp_path, "grid"))
        attempt.result_file.write_text('{"row": 3}')
        assert row(attempt)["step_seconds"] is None
        attempt.result_file.write_text('{"row": {"step_seco')
        assert row(attempt)["status"] == "crashed"
        attempt.status_file.write_text("")
        attempt.config_file.write_text("parallel: [")
        found = row(attempt)
        assert (found["status"], found["tp"]) == ("interrupted", None)


class TestRepeats:
    STEPS = ([9.0, 9.0, 0.1, 0.2, 0.3], [9.0, 9.0, 0.5, 0.6, 0.7], [9.0, 9.0, 0.2, 0.3, 0.4])

    def test_count_as_one(self, tmp_path: Path) -> None:
        for seconds in self.STEPS:
            attempt = record_attempt(SweepDirectory(tmp_path, "grid"), step_seconds=seconds)
        found = point_row(attempt.point)
        assert found is not None
        assert (found["repeats"], found["attempt"], found["step_seconds"]) == (3, 3, 0.3)  # of 0.2, 0.6 and 0.3
        # Of .1 .2 .2 .3 .3 .4 .5 .6 .7: a tenth between the first two is 0.18, nine tenths 0.62.
        assert found["step_seconds_p10"] == pytest.approx(0.18)
        assert found["step_seconds_p90"] == pytest.approx(0.62)
        assert found["tokens_per_second"] == pytest.approx(8 * 128 / 0.3)
        assert (found["tp"], found["peak_memory_bytes"]) == (1, 5 * 2**20)

    def test_one_that_ran_beside_others_marks_them_all(self, tmp_path: Path) -> None:
        for slots in (1, 2, 1):
            attempt = record_attempt(
                SweepDirectory(tmp_path, "grid"), f"launch.slots={slots}", "launch.threads_per_rank=1"
            )
        assert (point_row(attempt.point) or {})["slots"] == 2

    def test_rates_follow_from_the_step(self, tmp_path: Path) -> None:
        for seconds in self.STEPS[:2]:
            attempt = record_attempt(SweepDirectory(tmp_path, "grid"), step_seconds=seconds)
        found = point_row(attempt.point)
        assert found is not None
        assert found["step_seconds"] == pytest.approx(0.4)  # between 0.2 and 0.6
        assert found["tokens_per_second"] == pytest.approx(8 * 128 / 0.4)
        assert found["model_tflops_per_device"] == pytest.approx(8 * 128 / 0.4 * FLOPS_PER_TOKEN / 1e12)

    def test_a_failed_one_is_shown_alone_and_an_interrupted_one_not_at_all(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        for seconds in self.STEPS[:2]:
            attempt = record_attempt(sweep, step_seconds=seconds)
        record_attempt(sweep, status="interrupted", reason="stopped")
        assert (point_row(attempt.point) or {})["repeats"] == 2
        record_attempt(sweep, status="oom", reason="too big")
        found = point_row(attempt.point) or {}
        assert (found["status"], found["repeats"], found["step_seconds"]) == ("oom", None, None)

    def test_survive_damage(self, tmp_path: Path) -> None:
        for seconds in self.STEPS:
            attempt = record_attempt(SweepDirectory(tmp_path, "grid"), step_seconds=seconds)
        for other in attempt.point.attempts():
            other.metrics_file.write_text('{"step": 1}\n{"st')
        write_json(attempt.result_file, {"row": []})
        found = point_row(attempt.point) or {}
        assert found["repeats"] == 3
        assert found["step_seconds"] == pytest.approx(0.4)  # of the two that have one
        assert point_row(Point(tmp_path / "none")) is None


def test_what_an_emulated_model_would_compute_means_nothing() -> None:
    config = make_config("model=emulated", "data=synthetic")
    columns = measured_columns(MeasuredRun(config, step_records([0.1] * 20), MACHINE, 1e9, 1e12))
    assert columns["tokens_per_second"] > 0
    for column in ("model_tflops_per_device", "model_tflops_per_device_causal", "mfu", "gemm_utilization"):
        assert columns[column] is None


class TestInference:
    """Against values computed by hand from `inference_records`."""

    MEASURED: ClassVar = {
        "generation_seconds": 0.5, "generation_seconds_p10": 0.42, "generation_seconds_p90": 0.58,
        "tokens_per_second": 2000, "prefill_tokens_per_second": 600 / 0.125, "decode_tokens_per_second": 998 / 0.375,
        "prefill_bubble_fraction_measured": 0.25, "decode_bubble_fraction_measured": 0.125,
        "peak_memory_bytes": 3 * 2**20,
    }  # fmt: skip
    OF_REQUESTS: ClassVar = {
        "time_to_first_token_seconds": 0.07,  # of 0.04, 0.05, 0.06, 0.08, 0.10, 0.12
        "inter_token_seconds_p50": 0.005, "queue_seconds_p50": 0.02, "prefill_bubble_fraction_simulated": 0.2,
    }  # fmt: skip

    def test_generation(self, tmp_path: Path) -> None:
        found = row(record_inference(SweepDirectory(tmp_path, "grid"), "parallel.pp=2"))
        expected = self.MEASURED | self.OF_REQUESTS
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        layout = {"task": "generate", "part": "model", "batch_size": 8, "num_groups": 2, "prompt_length": 64}
        assert {name: found[name] for name in layout} == layout
        of_training = ("step_seconds", "micro_batch_size", "num_micro_batches", "schedule", "bubble_fraction_ideal",
                       "bubble_fraction_measured", "bubble_overhead_ideal", "first_loss", "last_loss", "drift",
                       "warmup_steps_detected", "mfu", "zero_stage", "engine", "parity")  # fmt: skip
        assert [name for name in of_training if found[name] is not None] == []

    def test_forward_passes(self, tmp_path: Path) -> None:
        attempt = record_inference(SweepDirectory(tmp_path, "grid"), "task=forward", seconds=[9, 9, 0.4, 0.5])
        found = row(attempt)
        expected = {"step_seconds": 0.45, "tokens_per_second": (2500 + 2000) / 2, "bubble_fraction_measured": 0.25,
                    "bubble_fraction_simulated": 0.2, "bubble_overhead_measured": 1 / 3}  # fmt: skip
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        of_sequences = ("generation_seconds", "batch_size", "num_groups", "prompt_length", "max_new_tokens",
                        "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds",
                        "kv_cache_bytes", "prefill_bubble_fraction_ideal")  # fmt: skip
        assert [name for name in of_sequences if found[name] is not None] == []

    def test_what_was_measured_before_a_crash_is_in_the_row(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        found = row(record_inference(sweep, status="crashed", seconds=[0.4, 0.5, 0.6, 9.0]))
        assert {name: found[name] for name in self.MEASURED} == pytest.approx(self.MEASURED)
        assert [found[name] for name in self.OF_REQUESTS] == [None] * len(self.OF_REQUESTS)
        early = row(record_inference(sweep, "task=forward", status="oom", seconds=[9, 9, 9]))
        assert (early["step_seconds"], early["tokens_per_second"]) == (None, None)
        damaged = record_inference(sweep, "parallel.tp=2", status="crashed")
        damaged.metrics_file.write_text('{"step": 1}\n')
        assert row(damaged)["generation_seconds"] is None

    def test_a_line_tells_of_a_measurement(self) -> None:
        (record,) = inference_records([0.5])
        read = inference_record_of(json.loads(json.dumps(inference_line(record))))
        assert read.prefill
        assert record.prefill
        assert replace(read.prefill, bubbles=record.prefill.bubbles) == record.prefill
        assert (read.number, read.seconds, read.tokens) == (1, 0.5, 1000)

    def test_repeats_are_one_row(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        sweep.prepare({"environment": environment(MACHINE)})
        for seconds in ([0.4, 0.5, 0.6], [0.7, 0.8, 0.9]):
            point = record_inference(sweep, seconds=seconds).point
        found = point_row(point)
        assert found
        values = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        assert found["repeats"] == 2
        assert found["generation_seconds"] == pytest.approx(0.65)
        assert found["generation_seconds_p10"] == pytest.approx(np.percentile(values, 10))
        assert found["generation_seconds_p90"] == pytest.approx(np.percentile(values, 90))
        assert found["tokens_per_second"] == pytest.approx(1000 / 0.65)
        assert found["step_seconds_p10"] is None

    def test_a_refused_point_shows_what_was_asked(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        asked = {"task": "generate", "generate": {"batch_size": 4, "max_new_tokens": 7}, "parallel": {"dp": 2},
                 "train": {"micro_batch_size": 3}}  # fmt: skip
        found = row(sweep.record_invalid(["parallel.dp=2"], asked, "don't generate together", "command"))
        assert (found["task"], found["batch_size"], found["max_new_tokens"], found["dp"]) == ("generate", 4, 7, 2)
        assert found["micro_batch_size"] is None

    def test_fewer_requests_than_slots_are_fewer_groups(self) -> None:
        config = make_config("task=generate", "parallel.pp=2", "generate.num_requests=1")
        assert layout_columns(config)["num_groups"] == 1

    def test_summary_has_the_three_bubbles_beside_each_other(self) -> None:
        config = make_config("task=generate", "parallel.pp=2")
        measured = inferred_columns(MeasuredInference(config, inference_records([0.5]), MACHINE))
        lines = inference_lines(config, measured)
        assert "prefill     4,800.0 tokens/s, bubble 25.0% measured, 20.0% simulated, 33.3% ideal" in lines
        passes = make_config("task=forward", "parallel.pp=2", "train.global_batch_size=4")
        measured = inferred_columns(MeasuredInference(passes, inference_records([0.5]), MACHINE))
        assert "bubble      25.0% measured, 20.0% simulated, 20.0% ideal" in inference_lines(passes, measured)
