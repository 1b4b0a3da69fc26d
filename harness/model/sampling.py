"""The next token of every sequence, from scores that are split by vocabulary over tensor-parallel ranks.

Every layout has to draw the same token from scores that differ by rounding. Inverting the cumulative distribution
doesn't: a shift of 1e-7 at each of 50,000 borders changes one draw in 200. The Gumbel-max trick (arXiv 2110.01515)
does: the token of the highest sum of score and Gumbel noise is distributed as softmax, and only a near tie of the two
best can change it. Noise is a hash of the seed, the sequence and the position; for every token it would cost more than
all else, so first a block of about sqrt(vocabulary) neighbours is drawn, then a token of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.corpus import draw
from harness.model.collectives import all_gather, gather_last_dim
from harness.model.groups import TensorParallel
from harness.spec.config import Generate

COLDEST = 1e-30
"""A temperature below counts as 0: scores divided by it could overflow, and no token but the best is likely."""


class Sampler:
    """Chooses next tokens from scores that tensor-parallel ranks share by vocabulary.

    In the order of transformers: repetition penalty, temperature, top-k, top-p, then a token is drawn. Each rank has
    padded_vocab/tp columns, a token each.
    """

    def __init__(self, settings: Generate, vocab_size: int, tp: TensorParallel) -> None:
        self._settings: Generate = settings
        self._greedy = settings.temperature < COLDEST
        self._vocab_size = vocab_size
        self._tp = tp
        self._width = math.isqrt(vocab_size - 1) + 1  # of a block, in tokens; the same in every layout
        self._num_blocks = -(-vocab_size // self._width)

    @torch.no_grad()
    def choose(self, logits: Tensor, samples: Sequence[int], positions: Sequence[int], seen: Tensor | None) -> Tensor:
        """The next tokens: [rows] int64, on the device of the logits and the same on all ranks; -1 of NaN.

        Args:
            logits: of this rank's tokens, [rows, columns] of any float type; may be overwritten.
            samples: number of each row's sequence, which has random numbers of its own.
            positions: in its sequence, of the token that is chosen.
            seen: which of this rank's tokens the sequence has, [rows, columns]; None: there is no penalty.
        """
        scores = self.adjusted(logits, seen)
        if self._greedy:
            highest, column = scores.max(dim=-1)  # the first of equal ones
            return self._best(highest, column + self._tp.rank * scores.shape[-1])
        noise = _gumbel_noise(self._num_blocks + self._width, self._settings.seed, samples, positions)
        return self._draw(scores, self.lowest(scores), noise.to(scores, non_blocking=True))

    def adjusted(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Scores [rows, columns] in fp32 (float64 stays), after penalty and temperature; padding has -inf."""
        logits[:, max(self._vocab_size - self._tp.rank * logits.shape[-1], 0) :] = -math.inf
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None:
            penalty = self._settings.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        return scores if self._greedy else scores / self._settings.temperature

    def lowest(self, scores: Tensor) -> Tensor | None:
        """The score from which on tokens are drawn, [rows, 1], the same on all ranks; None: all are.

        Tokens of equal score stay or go together, as nothing but their numbers tells them apart. Ranks exchange their
        `top_k` best scores; for `top_p` alone they exchange and sort whole rows.

        Args:
            scores: as `adjusted` gives them.
        """
        top_k, top_p = self._settings.top_k, self._settings.top_p
        if 0 < top_k < self._vocab_size:
            best = self._joined(scores.topk(min(top_k, scores.shape[-1])).values).topk(top_k).values
            lowest = best[:, -1:]
            if top_p == 1:
                return lowest
            num_remaining = self._joined((scores >= lowest).sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
            return _nucleus(best.flip(-1), top_p, num_remaining - top_k)
        return None if top_p == 1 else _nucleus(_ascending(self._joined(scores)), top_p)

    def _draw(self, scores: Tensor, lowest: Tensor | None, noise: Tensor) -> Tensor:
        """Tokens by softmax: P(token) = P(block) P(token | block), each factor by Gumbel-max with noise of its own.

        Args:
            noise: [rows, number of blocks + tokens of a block].
        """
        first, missing = divmod(self._tp.rank * scores.shape[-1], self._width)  # this rank may begin inside a block
        behind = -(missing + scores.shape[-1]) % self._width
        whole = F.pad(scores, (missing, behind), value=-math.inf)
        blocks = torch.unflatten(whole, -1, (-1, self._width))

        highest, masses = self._log_masses(blocks, first, lowest)
        block = (masses + noise[:, : self._num_blocks]).argmax(dim=-1, keepdim=True)

        row = torch.arange(len(block), device=block.device)
        place = (block - first).clamp(0, blocks.shape[1] - 1)
        tokens = blocks[row, place.squeeze(1)]
        out = place + first != block if lowest is None else (place + first != block) | (tokens < lowest)
        tokens = tokens - highest + noise[:, self._num_blocks :]
        score, token = tokens.masked_fill_(out, -math.inf).max(dim=-1)
        return self._best(score + 0 * highest.squeeze(1), token + self._width * block.squeeze(1))  # NaN stays

    def _log_masses(self, blocks: Tensor, first: int, lowest: Tensor | None) -> tuple[Tensor, Tensor]:
        """The highest score, [rows, 1], and each block's log of the sum of exp(score - highest), [rows, all blocks].

        They stay apart because large scores would round the logs, and the noise that is added to them, away.

        Args:
            blocks: this rank's part, [rows, its blocks, tokens of a block].
            first: number of the first one.
            lowest: see `lowest`.
        """
        highest = blocks.amax(dim=(1, 2)).clamp_(min=torch.finfo(blocks.dtype).min).unsqueeze(1)
        exponentials = _exponentials(blocks, highest.unsqueeze(2))
        if lowest is not None:  # as numbers: on a CPU that takes a fifth of a truth value's time
            exponentials *= torch.ge(blocks, lowest.unsqueeze(2), out=torch.empty_like(blocks))
        masses = exponentials.sum(dim=-1).log_()
        if self._tp.group is None:
            return highest, masses[:, : self._num_blocks]
        masses = F.pad(masses, (first, max(self._num_blocks - first - blocks.shape[1], 0)), value=-math.inf)
        ranks = all_gather(torch.cat((highest, masses[:, : self._num_blocks]), dim=1), self._tp.group).wait()
        of_ranks, masses = ranks[..., :1], ranks[..., 1:]
        highest = of_ranks.amax(dim=0)
        return highest, (masses + (of_ranks - highest)).logsumexp(dim=0)

    def _best(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Of the ranks' tokens [rows], those of the highest scores; of equal ones the first, of NaN none."""
        tokens = tokens.masked_fill(scores.isnan(), -1)
        if self._tp.group is None:
            return tokens
        ranks = all_gather(torch.stack((scores.double(), tokens.double())), self._tp.group).wait()
        winner = ranks[:, 0].argmax(dim=0, keepdim=True)  # NaN, if there is one
        return ranks[:, 1].gather(0, winner).squeeze(0).long()

    def _joined(self, tensor: Tensor) -> Tensor:
        """[rows, n] -> [rows, n x ranks]."""
        return gather_last_dim(tensor, self._tp.group)


def _nucleus(scores: Tensor, top_p: float, besides: Tensor | int = 0) -> Tensor:
    """The lowest score of the fewest tokens whose probabilities make up `top_p`, [rows, 1].

    As transformers, it takes away from below what has 1 - top_p at most.

    Args:
        scores: ascending, [rows, tokens].
        besides: how many more tokens have a row's lowest score, [rows, 1].
    """
    masses = _exponentials(scores, scores[:, -1:])
    masses[:, :1] *= 1 + besides
    masses = masses.cumsum(dim=-1)
    num_removed = torch.searchsorted(masses, (1 - top_p) * masses[:, -1:], right=True)
    return scores.gather(1, num_removed.clamp_(max=scores.shape[-1] - 1))


def _exponentials(scores: Tensor, highest: Tensor) -> Tensor:
    """exp(scores - highest), but e^-80 for what is less: no draw and no sum sees it, and subnormals are slow."""
    return (scores - highest).clamp_(min=-80).exp_()


def _ascending(scores: Tensor) -> Tensor:
    """Rows sorted; on a CPU by numpy, whose vectorized sort is 30 times as fast as torch's."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return scores.sort(dim=-1).values


def _gumbel_noise(count: int, seed: int, samples: Sequence[int], positions: Sequence[int]) -> Tensor:
    """[rows, count] in float64 on the CPU: -log(-log(u)) of uniform u."""
    places = zip(samples, positions, strict=True)
    bits = np.stack([draw(count, seed, sample, position, "token") for sample, position in places])
    uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # neither 0 nor 1
    return torch.from_numpy(-np.log(-np.log(uniform)))
