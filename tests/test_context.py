"""Masks and positions of documents: by their definition, and as documents on their own are computed."""

from __future__ import annotations

import pytest
import torch
from helpers_model import fill, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from references import MODELS
from torch import Tensor

from harness.model.assembly import SingleStage, build_layers
from harness.model.context import PassContext, positions_in
from harness.model.groups import TensorParallel
from harness.spec.config import Model

SINGLE = TensorParallel.single()
LENGTHS = [[3, 4, 2], [10], [1, 5]]
"""Of the documents of each row; the rest is padding."""


def numbered(lengths: list[list[int]], sequence: int) -> Tensor:
    """Rows as `Documents` gives them."""
    rows = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(
        [row + [len(of_row)] * (sequence - len(row)) for row, of_row in zip(rows, lengths, strict=True)]
    )


def context_of(documents: Tensor | None) -> PassContext:
    context = PassContext()
    context.documents = None if documents is None else lambda *_: documents
    return context


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
)
def test_masks_and_positions_by_their_definition(
    lengths: list[int], padding: int, causal: bool, window: int | None
) -> None:
    sequence = sum(lengths) + padding
    documents = numbered([lengths], sequence)
    context = context_of(documents)
    of, cpu = documents[0].tolist(), torch.device("cpu")
    mask = context.mask(torch.empty(sequence, 2), causal, window if causal else None)
    assert mask is not None
    for q in range(sequence):
        for k in range(sequence):
            seen = of[q] == of[k] and (not causal or (k <= q and (window is None or q - k < window)))
            assert mask[0, 0, q, k] == (0 if seen else -torch.inf), (q, k)
    starts = [of.index(number) for number in of]
    positions = context.positions(cpu)
    assert positions is not None
    assert positions[0].tolist() == [place - start for place, start in zip(range(sequence), starts, strict=True)]


def test_a_row_that_is_one_sequence_needs_no_mask() -> None:
    context, cpu = context_of(None), torch.device("cpu")
    assert context.positions(cpu) is None
    for window in (None, 8, 9):
        assert context.mask(torch.empty(8, 2), True, window) is None
    mask = context.mask(torch.empty(8, 2), True, 7)
    context.forward_pass = (1, 2)
    assert context.mask(torch.empty(8, 2), True, 7) is mask is not None


def test_the_layers_of_a_pass_share_what_is_made_for_it() -> None:
    asked = []
    context = PassContext(dp_rank=3)
    context.documents = lambda *place: (asked.append(place), torch.zeros(1, 4, dtype=torch.long))[1]
    query = torch.empty(4, 2)
    masks = [context.mask(query, True, None) for _ in range(3)]
    assert masks[0] is masks[2]
    context.forward_pass = (1, 2)
    assert context.mask(query, True, None) is not masks[0]
    assert asked == [(0, 0, 3), (1, 2, 3)]


def test_positions_begin_anew() -> None:
    assert positions_in(numbered(LENGTHS, 10)).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 0, 1, 0], list(range(10)), [0, 0, 1, 2, 3, 4, 0, 1, 2, 3],
    ]  # fmt: skip


def filled(model: Model, documents: Tensor | None) -> SingleStage:
    layers = build_layers(model, SINGLE, context=context_of(documents))
    fill(layers, model, random_state(model, dtype=torch.float64), SINGLE)
    return layers.double()


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_row_is_computed_as_on_its_own(name: str) -> None:
    """Logits of every document, and gradients of all that a loss of valid tokens gives; padding changes nothing."""
    model, sequence = MODELS[name], 10
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.vocab_size, (3, sequence), generator=generator)
    packed, alone = filled(model, numbered(LENGTHS, sequence)), filled(model, None)
    together = packed(tokens)
    weights = torch.randn(together.shape, generator=generator, dtype=torch.float64)
    loss, apart = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            own = slice(first, first + length)
            logits = alone(tokens[row : row + 1, own])
            assert torch.allclose(
                together[row, own], logits[0], rtol=0, atol=1e-11 * float(logits.detach().abs().max())
            )
            loss = loss + (together[row, own] * weights[row, own]).sum()
            apart = apart + (logits[0] * weights[row, own]).sum()
            first += length
    loss.backward()
    apart.backward()
    expected = dict(alone.named_parameters())
    for key, parameter in packed.named_parameters():
        assert parameter.grad is not None
        wanted = expected[key].grad
        assert wanted is not None
        assert torch.allclose(parameter.grad, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max())), key
