"""Cross-entropy over a vocabulary that is split over ranks; the whole logits never exist anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.model.collectives import all_gather
from harness.model.groups import TensorParallel

IGNORE_INDEX = -100
"""Target of a token that is not learned from."""


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, tp: TensorParallel, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Loss of every token: -log softmax(logits)[target], 0 where the target is `ignore_index`.

    Computed in fp32 whatever the type of the logits (float64 stays), as accurately as `F.cross_entropy`
    in fp32: on a CPU both rest on torch's softmax, which adds up a row number by number in vectors. That
    can lose 2^-24 per addition, most where one column is nearly all, and more where vectors are short.

    As in Megatron-LM (arXiv 1909.08053, section 3) ranks exchange numbers per token, not logits: the
    maximum, the sum of exponentials below it and the target's logit, in one all-gather, merged like the
    blocks of an online softmax (arXiv 1805.02867), so every rank gets the same bits.

    Args:
        logits: this rank's columns [..., padded_vocab/tp]; those from `vocab_size` on don't count.
        targets: token numbers [...], the same on all ranks; one outside the vocabulary gives NaN.

    Returns:
        Losses [...], the same on all ranks.
    """
    arguments = (logits, targets, vocab_size, tp, ignore_index)
    return _CrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]


class PipelineLoss:
    """Loss of a micro-batch for the pipeline engine: (logits, (targets, weight)) -> scalar.

    The engine averages over m micro-batches and dp replicas, whose numbers of valid tokens differ.
    With weight = m x dp / (valid tokens of the global batch), a 0-dimensional float tensor, that
    average is the sum of all token losses over the number of valid tokens, in every layout.
    """

    def __init__(self, vocab_size: int, tp: TensorParallel) -> None:
        self.vocab_size = vocab_size
        self.tp = tp

    def __call__(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [batch, sequence, padded_vocab/tp], targets [batch, sequence]."""
        targets, weight = labels
        return vocab_parallel_cross_entropy(logits, targets, self.vocab_size, self.tp).sum() * weight


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, tp: TensorParallel, ignore_index: int
    ) -> Tensor:
        counted = targets != ignore_index
        logits = _without_padding(logits, vocab_size, tp)
        column = targets - tp.rank * logits.shape[-1]
        owned = (column >= 0) & (column < logits.shape[-1]) & counted
        column = column.masked_fill_(~owned, 0).unsqueeze(-1)

        maximum = logits.amax(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))
        softmax = torch.softmax(logits, dim=-1, dtype=maximum.dtype)  # over this rank's columns
        total = softmax.amax(dim=-1).reciprocal_()  # of exponentials: the maximum's own is 1
        target_logit = logits.gather(-1, column).squeeze(-1).to(maximum.dtype).masked_fill_(~owned, 0)

        summary = torch.stack((maximum, total, target_logit))
        ranks = summary.unsqueeze(0) if tp.group is None else all_gather(summary, tp.group).wait()
        maxima, totals, target_logits = ranks.unbind(dim=1)
        global_maximum = maxima.amax(dim=0)
        global_total = (totals * (maxima - global_maximum).exp_()).sum(dim=0)
        losses: Tensor = global_total.log() - (target_logits.sum(dim=0) - global_maximum)
        losses.masked_fill_((targets < 0) | (targets >= vocab_size), torch.nan).masked_fill_(~counted, 0)

        share = total * (maximum - global_maximum).exp_() / global_total  # probability of this rank's columns
        ctx.save_for_backward(softmax, share.masked_fill_(~counted, 0), losses, column, owned)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(softmax - one hot) x gradient; in place, so a second backward is an error, not wrong."""
        softmax, share, losses, column, owned = ctx.saved_tensors
        gradient = gradients[0]
        logits_gradient = softmax.mul_((gradient * share).unsqueeze(-1))
        # softmax - 1 of the target is expm1(-loss): no rounded products to cancel.
        at_target = (gradient * torch.expm1(-losses)).unsqueeze(-1)
        elsewhere = logits_gradient.gather(-1, column)
        logits_gradient.scatter_(-1, column, torch.where(owned.unsqueeze(-1), at_target, elsewhere))
        return logits_gradient.to(ctx.dtype), None, None, None, None


def _without_padding(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """The logits with padded columns, which only the last ranks have, as small as can be.

    Finite, so that a rank of padding alone gets a share of 0 instead of NaN.
    """
    num_columns = logits.shape[-1]
    first_padded = vocab_size - tp.rank * num_columns
    if first_padded >= num_columns:
        return logits
    padded = torch.arange(num_columns, device=logits.device) >= first_padded
    return logits.masked_fill(padded, torch.finfo(logits.dtype).min)
