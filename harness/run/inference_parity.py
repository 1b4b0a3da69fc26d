"""Does a layout generate what one rank computes?

A layout generates through its ring as it is configured: prompts of unequal length, in chunks if it has any, in groups,
and more of them than there are places in its cache, so that sequences enter and leave. The scores that each token was
chosen from are compared with those of one rank of plain torch in float64, which has the same random weights, neither
cache nor ring, and sees each sequence at once, up to the token. It is given the tokens that the layout chose: where two
are nearly as good, rounding decides, and what follows is another text. Compared are

- the scores of every token that was chosen (a wrong position, mask, place in the cache, slice or reduction);
- the tokens. The highest score is to be chosen: how much higher the reference's highest is than its score of the
  chosen token. Drawn ones are to be those that one rank draws from the same scores, exactly;
- the bytes of the cache, exactly those that were predicted.

With task=forward the scores of all positions of a global batch are compared, with model.part=layer what the layer adds
up to. Differences are judged as in `harness.run.parity`, token by token.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harness.model.assembly import SingleStage, build_layers
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.precision import dtype_of
from harness.model.sampling import COLDEST, Sampler
from harness.prompts import random_prompt
from harness.record.heartbeat import Phase, no_phase
from harness.run.inference.ring import Ring, draw_hidden
from harness.run.inference.stage import Stage
from harness.run.parity import TOLERANCE, Comparison, Tensors, compare, random_weights
from harness.run.tasks.forward import random_rows, works_of
from harness.run.weights import fill_parameters
from harness.spec.batching import Batcher, Chosen, Feed, Passes, Work
from harness.spec.config import RunConfig
from harness.spec.kv_cache import kv_cache_bytes, limits, longest_sequence, num_groups

EXACT = 1e-9
"""Tolerance of what is counted."""

SHARES = (1.0, 0.0, 0.6, 0.3, 0.8)
"""Of generate.prompt_length beyond its first token, in turns: in each pass some row has padding, and a short sequence
enters where a long one was."""

UNEVEN_ENDS = 3
"""Different numbers of tokens that sequences get: they leave at different times."""


class Layout:
    """The stages and their ring under test, whose scores are kept. Built by all ranks at once.

    Args:
        num_slots: see `Stage`.
        most_rows: see `Ring`.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        prompts: Sequence[Sequence[int]],
        num_slots: int | None,
        most_rows: int,
        weights: Tensors,
        phase: Phase,
    ) -> None:
        self.config, self.rank = config, rank
        self.stage = Stage(config, rank, prompts, num_slots, weights.__getitem__, phase)
        phase("meeting the other stages")
        self.ring = Ring(self.stage, rank, prompts, most_rows)
        self.stage.scored = self._keep
        self._scores: dict[str, Any] = {}

    def _keep(self, work: Work, scores: Tensor) -> None:
        for row, of_row in zip(work.choosing or work.rows, scores.double().cpu().numpy(), strict=True):
            for position, of_token in enumerate(of_row, start=row.end - len(of_row)):
                self._scores[name_of(row.request, position)] = of_token.copy()

    def run(self, feed: Feed | None) -> list[Chosen]:
        """Let a feed go round; the tokens that were chosen, on rank 0. A collective call."""
        tokens: list[Chosen] = []
        self.ring.run(feed, tokens.extend)
        return tokens

    def gather(self) -> Tensors | None:
        """Whole scores [vocabulary], or what a layer computes, [hidden], by name on rank 0; a collective call.

        Copies that differ over tensor-parallel ranks, where they must be equal, become NaN.
        """
        ranks: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(self._scores, ranks, dst=0)
        if ranks is None:
            return None
        topology, model, whole = self.stage.topology, self.config.model, {}
        last = [ranks[topology.rank(pp=topology.pp - 1, tp=tp)] for tp in range(topology.tp)]
        for name in last[0]:
            slices = [torch.from_numpy(of_rank[name]) for of_rank in last]
            if model.part == "model":
                whole[name] = torch.cat(slices)[: model.vocab_size]
            else:
                alike = all(torch.equal(copy, slices[0]) for copy in slices)
                whole[name] = slices[0] if alike else torch.full_like(slices[0], torch.nan)
        return whole

    def compare_cache(self, num_slots: int, num_positions: int) -> Comparison | None:
        """What the caches of all ranks take, on rank 0; a collective call."""
        ranks: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(self.stage.num_cache_bytes, ranks, dst=0)
        if ranks is None:
            return None
        of_stages = kv_cache_bytes(self.config, num_slots, num_positions)
        predicted = [of_stages[self.stage.topology.coordinate(rank).pp] for rank in range(len(ranks))]
        errors = [abs(found - wanted) / max(1, wanted) for found, wanted in zip(ranks, predicted, strict=True)]
        worst = max(range(len(ranks)), key=errors.__getitem__)
        where = f"{ranks[worst]:,} of rank {worst}, expected {predicted[worst]:,}"
        return Comparison("cache bytes", where, errors[worst], EXACT)


class Choice(NamedTuple):
    """A token that was chosen."""

    request: int
    before: list[int]
    """All tokens of the sequence until then."""
    token: int

    @property
    def name(self) -> str:
        """Of the scores that it was chosen from."""
        return name_of(self.request, len(self.before) - 1)


class Reference:
    """One rank of plain torch in float64, without a cache."""

    def __init__(self, config: RunConfig, weights: Tensors) -> None:
        self._config, self._dtype = config, dtype_of(config.train.precision)
        self.model = self._build(weights)

    def _build(self, weights: Tensors) -> SingleStage:
        config, tp = self._config, TensorParallel.single()
        # Rounded as the layout's are, then exact.
        own = {name: weight.to(self._dtype).double() for name, weight in weights.items()}
        model = build_layers(config.model, tp, context=PassContext(config.train.seed)).double().eval()
        fill_parameters(model.named_parameters(), config, tp, own.__getitem__)
        return model

    @torch.no_grad()
    def scores(self, tokens: Sequence[int]) -> Tensor:
        """Of the token after each of these, [length, vocabulary]."""
        scores: Tensor = self.model(torch.tensor([tokens]))[0, :, : self._config.model.vocab_size]
        return scores

    @torch.no_grad()
    def layer(self, hidden: Tensor) -> Tensor:
        """What the first layer makes of hidden states, [rows, length, hidden]."""
        output: Tensor = self.model.blocks[0](hidden.to(self._dtype).double())
        return output


def check_inference(config: RunConfig, rank: int, phase: Phase = no_phase) -> list[Comparison]:
    """Compare what the layout of `config` generates, or its forward passes, with one rank.

    A collective call, the answer is rank 0's. The model should be small (`harness.spec.twin`).

    Args:
        phase: told what is done next.
    """
    weights = random_weights(config.model, config.train.seed)
    compared = _check_generation if config.task == "generate" else _check_passes
    comparisons = compared(config, rank, weights, phase)
    gc.collect()  # the groups that are left end with the last reference
    return comparisons


def _check_generation(config: RunConfig, rank: int, weights: Tensors, phase: Phase) -> list[Comparison]:
    settings = config.generate
    prompts = uneven_prompts(config)
    lengths = [*map(len, prompts)]
    most = [max(1, limit - number % UNEVEN_ENDS) for number, limit in enumerate(limits(config, lengths))]
    num_slots = min(settings.batch_size, len(prompts))
    layout = Layout(config, rank, prompts, num_slots, num_slots, weights, phase)
    phase("generating")
    batcher = None
    if rank == 0:
        groups = num_groups(config, num_slots)
        batcher = Batcher(lengths, most, num_slots, groups, settings.prefill_chunk, settings.prefill_batch_size)
        batcher.offer(range(len(prompts)))
    chosen = layout.run(batcher)
    phase("gathering the scores")
    measured = layout.gather()
    cache = layout.compare_cache(num_slots, longest_sequence(config, lengths))
    layout.ring.destroy()
    if measured is None or cache is None:
        return []
    phase("computing the reference")
    choices, texts = list[Choice](), [[*prompt] for prompt in prompts]
    for request, token, _ in chosen:
        choices.append(Choice(request, [*texts[request]], token))
        texts[request].append(token)
    if problem := _problem([text[length:] for text, length in zip(texts, lengths, strict=True)], most, config):
        return [Comparison("tokens", problem, float("nan"), EXACT), cache]
    reference = Reference(config, weights)
    expected: Tensors = {}
    for request, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        scores = reference.scores(text[:-1])
        expected |= {name_of(request, position): scores[position] for position in range(length - 1, len(scores))}
    is_greedy = settings.temperature < COLDEST
    tokens = compare_highest(choices, expected, config) if is_greedy else compare_drawn(choices, measured, config)
    return [_compare_scores("scores", measured, expected, config), tokens, cache]


def _problem(sequences: Sequence[Sequence[int]], most: Sequence[int], config: RunConfig) -> str | None:
    """What the reference can't be asked about."""
    for request, (tokens, count) in enumerate(zip(sequences, most, strict=True)):
        outside = [token for token in tokens if not 0 <= token < config.model.vocab_size]
        if outside:
            return f"sequence {request} has {outside[0]}, which is no token"
        if len(tokens) != count:
            return f"sequence {request} has {len(tokens)} tokens, expected {count}"
    return None


def _check_passes(config: RunConfig, rank: int, weights: Tensors, phase: Phase) -> list[Comparison]:
    rows, size = random_rows(config), config.train.micro_batch_size
    layout = Layout(config, rank, rows, None, size, weights, phase)
    works = works_of(config, 0)
    phase("computing the passes")
    layout.run(Passes(works) if rank == 0 else None)
    phase("gathering the scores")
    measured = layout.gather()
    layout.ring.destroy()
    if measured is None:
        return []
    phase("computing the reference")
    reference = Reference(config, weights)
    expected: Tensors = {}
    for work in works:
        if config.model.part == "layer":
            outputs = reference.layer(draw_hidden((size, work.length, config.model.hidden_size)))
        else:
            outputs = torch.stack([reference.scores(rows[row.request]) for row in work.rows])
        for row, output in zip(work.rows, outputs, strict=True):
            expected |= {name_of(row.request, position): values for position, values in enumerate(output)}
    kind = "scores" if config.model.part == "model" else "outputs of the layer"
    return [_compare_scores(kind, measured, expected, config)]


def name_of(request: int, position: int) -> str:
    """Of what is computed at a position."""
    return f"position {position} of sequence {request}"


def uneven_prompts(config: RunConfig) -> list[list[int]]:
    """Random prompts of unequal length, the longest as long as configured."""
    settings = config.generate
    count, longest = settings.num_requests or settings.batch_size, settings.prompt_length
    lengths = [1 + round(SHARES[number % len(SHARES)] * (longest - 1)) for number in range(count)]
    return [random_prompt(settings, config.model, number)[:length] for number, length in enumerate(lengths)]


def _compare_scores(kind: str, measured: Tensors, expected: Tensors, config: RunConfig) -> Comparison:
    """Token by token; those that were not scored are missing."""
    scored = {name: measured[name] for name in expected if name in measured}
    return compare(kind, scored, expected, TOLERANCE[config.train.precision])


def compare_highest(choices: Sequence[Choice], expected: Tensors, config: RunConfig) -> Comparison:
    """How far the reference's score of a token is below its highest, as a share of the norm of all its scores.

    Two scores that are off by the tolerance may change places.
    """
    errors = {}
    for choice in choices:
        scores = penalized(expected[choice.name], choice.before, config.generate.repetition_penalty)
        errors[choice.name] = float((scores.max() - scores[choice.token]) / torch.linalg.vector_norm(scores))
    worst = max(errors, key=errors.__getitem__)
    return Comparison("tokens", worst, errors[worst], 2 * TOLERANCE[config.train.precision])


def penalized(scores: Tensor, before: Sequence[int], penalty: float) -> Tensor:
    """Scores [vocabulary], those of tokens that the sequence has lowered."""
    scores = scores.clone()
    for token in set(before):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    return scores


def compare_drawn(choices: Sequence[Choice], measured: Tensors, config: RunConfig) -> Comparison:
    """The share of tokens that one rank draws otherwise, from the scores that the layout drew from."""
    settings, vocab_size = config.generate, config.model.vocab_size
    sampler, wrong = Sampler(settings, vocab_size, TensorParallel.single()), []
    for choice in choices:
        seen = torch.zeros(1, vocab_size, dtype=torch.bool)
        seen[0, choice.before] = True
        scores = measured.get(choice.name, torch.full([vocab_size], torch.nan))
        exact = scores.to(dtype_of(config.train.precision)).unsqueeze(0)
        drawn = int(sampler.choose(exact, [choice.request], [len(choice.before)], seen))
        if drawn != choice.token:
            wrong.append(f"{choice.name}: {choice.token}, expected {drawn}")
    return Comparison("drawn tokens", (wrong or ["all as expected"])[0], len(wrong) / len(choices), EXACT)
