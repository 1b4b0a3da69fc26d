"""What can't be generated with: every check of `generate` that types can't make, each with its sentence."""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import ConfigError
from harness.spec.config import Parallel, RunConfig
from harness.spec.families import FAMILIES

HELD_OUT_SAMPLES = 8
"""That perplexity is measured on where nobody says."""


def check_generation(config: RunConfig) -> None:
    """Refuse models and layouts that generate nothing, and settings that contradict each other.

    Raises:
        ConfigError: with what is wrong, the values and the remedy.
    """
    _check_model(config)
    _check_layout(config.parallel, "generate")
    _check_sampling(config)
    _check_requests(config)
    _check_perplexity(config)
    if config.generate.output is not None:
        _check_output(config.generate.output, config.generate.prompts_file)
        if not gives_prompts(config):
            raise ConfigError(
                f"generate.output={config.generate.output!r} is for what follows prompts, and there are none; give "
                "generate.prompt or generate.prompts_file, or leave it out"
            )


def check_forward(config: RunConfig) -> None:
    """Refuse layouts in which no forward passes alone are run.

    Raises:
        ConfigError: likewise.
    """
    _check_layout(config.parallel, "forward")
    if config.model.part == "layer" and config.parallel.pp > 1:
        raise ConfigError(
            f"model.part=layer is one layer, which parallel.pp={config.parallel.pp} can't be shared by; use "
            "parallel.pp=1, or model.part=model"
        )
    if config.data.documents != "cut":
        raise ConfigError(
            f"data.documents={config.data.documents} says what training samples are made of, and task=forward has "
            "random tokens; use data.documents=cut"
        )


def gives_prompts(config: RunConfig) -> bool:
    """Whether there is a text to go on from, instead of random tokens to measure with."""
    return config.generate.prompt is not None or config.generate.prompts_file is not None


def has_phases(config: RunConfig) -> bool:
    """Whether all prompts are computed before any further token: random ones that all have a place and come at once."""
    settings = config.generate
    enter_later = settings.request_rate is not None or (settings.num_requests or 0) > settings.batch_size
    return not gives_prompts(config) and not enter_later


def rounds(config: RunConfig) -> bool:
    """Whether weights or activations are rounded to fewer bits than fp32 has."""
    return config.generate.quantization != "none" or config.train.precision != "fp32"


def in_full_precision(config: RunConfig) -> RunConfig:
    """The same without such rounding."""
    train = config.train.model_copy(update={"precision": "fp32"})
    generate = config.generate.model_copy(update={"quantization": "none"})
    return config.model_copy(update={"train": train, "generate": generate})


def num_perplexity_samples(config: RunConfig) -> int:
    """Held-out samples that a generation's perplexity is measured on.

    Unless it is asked for, it is where it says what rounding does, of weights that mean something.
    """
    if config.task != "generate":
        return 0
    if (asked := config.generate.perplexity_samples) is not None:
        return asked
    return HELD_OUT_SAMPLES if rounds(config) and config.model.weights is not None else 0


def _check_model(config: RunConfig) -> None:
    if not config.model.causal:
        causal = ", ".join(name for name, family in FAMILIES.items() if family.causal)
        raise ConfigError(
            f"task=generate needs a model that predicts the next token, not model.family={config.model.family} with "
            f"train.objective={config.train.objective}; use train.objective=causal, or one of {causal}"
        )


def _check_layout(parallel: Parallel, task: str) -> None:
    if parallel.dp > 1:
        raise ConfigError(
            f"parallel.dp={parallel.dp} replicas share no work of task={task}; use parallel.dp=1, and start several "
            "runs with a share of it each"
        )
    if parallel.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel=true is for training, where activations of long sequences are kept; use "
            f"parallel.sequence_parallel=false with task={task}"
        )
    if parallel.engine != "deepspeed":
        raise ConfigError(
            f"parallel.engine={parallel.engine} only trains; leave parallel.engine at deepspeed with task={task}"
        )
    if parallel.num_chunks > 1:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} has parallel.num_chunks={parallel.num_chunks} parts of the model "
            f"on each stage, and task={task} takes one; use parallel.schedule=1f1b parallel.num_chunks=1"
        )


def _check_sampling(config: RunConfig) -> None:
    settings, vocab_size = config.generate, config.model.vocab_size
    if settings.top_k > vocab_size:
        raise ConfigError(
            f"generate.top_k={settings.top_k} exceeds model.vocab_size={vocab_size}; use 0 to draw from all tokens"
        )
    outside = [token for token in settings.stop_tokens or [] if token >= vocab_size]
    if outside:
        raise ConfigError(
            f"generate.stop_tokens={settings.stop_tokens} has the token {outside[0]}, but model.vocab_size="
            f"{vocab_size}; leave it out, or null for the model's own"
        )
    if "" in settings.stop_strings:
        raise ConfigError(
            f"generate.stop_strings={settings.stop_strings} has an empty text, which would end everything at once; "
            "leave it out"
        )


def _check_requests(config: RunConfig) -> None:
    settings = config.generate
    for key in ("num_groups", "prefill_batch_size"):
        value = getattr(settings, key)
        if value is not None and value > settings.batch_size:
            raise ConfigError(
                f"generate.{key}={value} exceeds generate.batch_size={settings.batch_size}; use {settings.batch_size} "
                "or less, or raise generate.batch_size"
            )
    given = next((key for key in ("prompt", "prompts_file") if getattr(settings, key) is not None), None)
    if given is not None and settings.num_requests is not None:
        raise ConfigError(
            f"generate.num_requests={settings.num_requests} is a number of random prompts, but generate.{given} gives "
            "others; leave one of them out"
        )
    longest = config.model.max_position_embeddings - 1
    if given is None and settings.prompt_length > longest:
        raise ConfigError(
            f"generate.prompt_length={settings.prompt_length} leaves no position for a new token at "
            f"model.max_position_embeddings={longest + 1}; use {longest} or less"
        )


def _check_perplexity(config: RunConfig) -> None:
    if num_perplexity_samples(config) == 0:
        return
    if not config.model.architecture.computes:
        raise ConfigError(
            f"model.family={config.model.family} computes nothing that has a perplexity; use "
            "generate.perplexity_samples=0"
        )
    if config.data.documents != "cut":
        raise ConfigError(
            f"data.documents={config.data.documents} says what training samples are made of, and perplexity is "
            "measured on windows of the text; use data.documents=cut, or generate.perplexity_samples=0"
        )


def _check_output(output: str, prompts_file: str | None) -> None:
    key, file = f"generate.output={output!r}", Path(output).expanduser()
    if file.is_dir():
        raise ConfigError(f"{key} is a folder; give a file in it, such as {file / 'generated.jsonl'}")
    if not file.parent.is_dir():
        raise ConfigError(f"{key} can't be written, as there is no folder {file.parent}; make it, or give another file")
    place = file.resolve()
    is_replaced = place.is_file() or not place.exists()
    if not os.access(place.parent if is_replaced else place, os.W_OK):
        raise ConfigError(f"{key} can't be written (permission denied); give a file where you can write")
    if prompts_file is not None and file.resolve() == Path(prompts_file).expanduser().resolve():
        raise ConfigError(f"{key} is generate.prompts_file, which would be lost; give another file")
