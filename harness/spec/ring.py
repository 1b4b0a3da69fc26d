"""The ring in which groups of sequences go round the stages, as instructions: what each stage does, in which order.

A pass goes from the first stage to the last, which chooses tokens and sends them back to the first. What passes when is
decided by a `Feed`; here is what that makes the stages do. Stages execute these instructions one by one as they
come, and the simulator times them, of a real ring or of one that nobody ran.

With p equal stages, free transfers and G groups that each take r passes, all stages have worked after

    T = r G + p - 1            G >= p: a group's tokens are back before its turn
    T = r p + G - 1            G <  p: stages wait for them

of which each works r G: the idle shares are `ideal_decode_bubble`. Passes that wait for no tokens, as prefill, are m in
a row: (p - 1) / (m + p - 1), as in arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from harness.spec.batching import Batcher, Feed, Phase, Work
from harness.spec.generation import has_phases
from harness.spec.kv_cache import limits, num_groups
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule, forward

if TYPE_CHECKING:
    from harness.spec.config import RunConfig


def first_stage(feed: Feed, num_stages: int) -> Iterator[Instruction | Work]:
    """What the first stage does until its feed has no turn left; each `Work` comes just before its forward pass.

    Whoever executes a `recv_tokens`, or with one stage a forward pass, delivers the tokens before going on.
    """
    while (turn := feed.turn()) is not None:
        awaited, begins = turn
        if num_stages > 1:
            yield from (Instruction("recv_tokens", work.number, peer=num_stages - 1) for work in awaited)
        for work in begins:
            yield work
            yield forward(work.number)
            if num_stages > 1:
                yield Instruction("send_activation", work.number, peer=1)


def later_stage(stage: int, num_stages: int, numbers: Iterable[int], chooses: Iterable[bool]) -> Iterator[Instruction]:
    """What another stage does.

    Args:
        numbers: of the passes, in order.
        chooses: of each pass, once its forward pass is done: whether tokens go back.
    """
    said = iter(chooses)
    for number in numbers:
        yield Instruction("recv_activation", number, peer=stage - 1)
        yield forward(number)
        if stage < num_stages - 1:
            yield Instruction("send_activation", number, peer=stage + 1)
        elif next(said):
            yield Instruction("send_tokens", number, peer=0)


def ring_schedule(feed: Feed, num_stages: int) -> tuple[Schedule, list[Work]]:
    """All that the stages do where tokens mean nothing, and the passes; passes are numbered from 0 in it."""
    first: list[Instruction] = []
    passes: dict[int, Work] = {}
    for step in first_stage(feed, num_stages):
        if isinstance(step, Work):
            passes[step.number] = step
            continue
        first.append(step)
        comes_back = step.kind == ("recv_tokens" if num_stages > 1 else "forward")
        if comes_back and passes[step.micro_batch].choosing:
            feed.deliver(work := passes[step.micro_batch], [0] * len(work.choosing))
    works = list(passes.values())
    chooses = [bool(work.choosing) for work in works]
    stages = [first] + [list(later_stage(s, num_stages, passes, chooses)) for s in range(1, num_stages)]
    begins = min(passes, default=0)
    numbered = [[i._replace(micro_batch=i.micro_batch - begins) for i in stage] for stage in stages]
    return Schedule("ring", max(1, len(works)), Placement(num_stages), numbered), works


def ideal_prefill_bubble(num_stages: int, num_passes: int) -> float:
    """Idle share of equal stages with free transfers while prompts are computed in so many passes."""
    return float(Fraction(num_stages - 1, num_passes + num_stages - 1))


def ideal_decode_bubble(num_stages: int, num_groups: int, rounds: int) -> float:
    """Idle share of equal stages with free transfers while each group gets so many tokens."""
    p, groups = num_stages, num_groups
    total = rounds * groups + p - 1 if groups >= p else rounds * p + groups - 1
    return float(1 - Fraction(rounds * groups, total))


def ideal_bubble_of(config: RunConfig, phase: Phase) -> float | None:
    """Of a phase of a run; None where it has no phase of its own."""
    if not has_phases(config):
        return None
    settings, pp = config.generate, config.parallel.pp
    count = settings.num_requests or settings.batch_size
    groups, new = num_groups(config, count), limits(config, [settings.prompt_length])[0]
    if phase == "decode":
        return ideal_decode_bubble(pp, groups, new - 1) if new > 1 else None
    prompts = [settings.prompt_length] * count
    batcher = Batcher(prompts, [1] * count, count, groups, settings.prefill_chunk, settings.prefill_batch_size)
    batcher.offer(range(count))
    return ideal_prefill_bubble(pp, len(ring_schedule(batcher, pp)[1]))
