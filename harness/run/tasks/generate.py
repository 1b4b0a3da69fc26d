"""Generation, as one rank does it: text from prompts that were given, or measurements with random ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from harness.analyse.inference import build_inference_result
from harness.machine import Machine, detect_machine
from harness.model.products import library
from harness.prompts import held_out_config
from harness.record.heartbeat import Heart
from harness.record.inference import HeldOut, InferenceRecord, MeasuredInference, inference_line
from harness.record.store import Attempt, write_json
from harness.record.summary import print_inference
from harness.run.data import HeldOutSamples
from harness.run.inference.generation import Generation, share_requests
from harness.run.inference.meter import Meter
from harness.run.inference.perplexity import measure_perplexity
from harness.run.inference.ring import Ring
from harness.run.inference.texts import Texts
from harness.run.instruments.memory import peak_memory_bytes, reset_peak_memory
from harness.run.tasks.train import set_up_device, share_corpus
from harness.spec.config import RunConfig
from harness.spec.generation import gives_prompts, num_perplexity_samples
from harness.strict_json import dumps


def generate(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Generate as configured; write generated.jsonl, metrics.jsonl, spans/ and, when every rank is done, result.json.

    Of prompts that were given all is done once; what is measured is done `generate.repeats` times. What rounding does
    to perplexity is measured before.
    """
    machine = detect_machine()
    set_up_device(config, machine)
    heart = Heart(attempt.path, rank)
    heart.phase("reading the prompts")
    requests, tokenizer = share_requests(config, rank)
    held_out = perplexity_of(config, rank, heart, machine)
    generation = Generation(attempt, config, rank, requests, machine, heart)
    reset_peak_memory()
    texts, repeats = None, 1
    if gives_prompts(config):
        if rank == 0:
            assert tokenizer is not None
            texts = Texts(attempt, config.generate, requests, tokenizer)
    else:
        repeats = config.generate.repeats
        generation.warm_up()
    records: list[InferenceRecord] = []
    metrics = attempt.metrics_file.open("w") if rank == 0 else None
    for _ in range(repeats):
        record = generation.run(texts)
        if record is not None and metrics is not None:
            records.append(record)
            metrics.write(dumps(inference_line(record)) + "\n")
            metrics.flush()
    if texts is not None:
        texts.close()
    heart.phase("writing the result")
    generation.meter.close()
    if metrics is not None:
        metrics.close()
    predicted = generation.predicted_cache_bytes
    conclude(attempt, config, machine, rank, generation.ring, generation.meter, records, predicted, held_out)


def perplexity_of(config: RunConfig, rank: int, heart: Heart, machine: Machine) -> HeldOut | None:
    """Losses on the held-out text of the configuration; None where they are not asked for. Collective."""
    if num_perplexity_samples(config) == 0:
        return None
    heart.phase("reading the held-out text")
    held_out = held_out_config(config)
    corpus = share_corpus(held_out, rank)
    samples = HeldOutSamples(held_out, corpus)
    rows = [samples.sample(0, number) for number in range(held_out.train.eval_samples)]
    return measure_perplexity(config, rank, rows, corpus.source, heart, machine)


def conclude(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    rank: int,
    ring: Ring,
    meter: Meter,
    records: Sequence[InferenceRecord],
    predicted_cache_bytes: Sequence[int],
    held_out: HeldOut | None = None,
) -> None:
    """Write result.json, and print the summary; a collective call of all ranks.

    Args:
        predicted_cache_bytes: of one rank of every stage.
        held_out: losses, where they were measured.
    """
    own = ring.stage.num_cache_bytes, peak_memory_bytes()
    ranks: list[tuple[int, int]] | None = [own] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(own, ranks, dst=0, group=meter.group)
    if ranks is None:
        return
    cache, peaks = zip(*ranks, strict=True)
    predicted = [predicted_cache_bytes[ring.topology.coordinate(r).pp] for r in range(len(ranks))]
    run = MeasuredInference(config, records, machine, max(cache), held_out)
    result = build_inference_result(run, cache, predicted, peaks, ring.transport, library())
    write_json(attempt.result_file, result)
    print_inference(config, result)
