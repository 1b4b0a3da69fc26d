"""Loss on held-out text, the same in every layout."""

from __future__ import annotations

from harness.corpus import Corpus
from harness.run.data import HeldOutSamples, step_micro_batches, tell_documents
from harness.run.engines.engine import Engine
from harness.spec.config import RunConfig


class Evaluation:
    """Forward passes over the held-out samples; training goes on as if there had been none."""

    def __init__(self, config: RunConfig, corpus: Corpus, engine: Engine, rank: int) -> None:
        share = config.train.micro_batch_size * config.parallel.dp
        whole = -(-config.train.eval_samples // share) * share  # the last micro-batches are filled up with nothing
        train = config.train.model_copy(update={"global_batch_size": whole})
        self._config = config.model_copy(update={"train": train})
        self._samples = HeldOutSamples(config, corpus)
        self._engine = engine
        self._dp_rank = engine.topology.coordinate(rank).dp

    def loss(self) -> float:
        """Sum of all token losses over their number; a collective call of all ranks, equal on all."""
        micro_batches = step_micro_batches(self._config, self._samples, self._dp_rank, step=0)
        context = self._engine.context
        training = context.documents, context.shares
        tell_documents(context, self._config, self._samples)
        try:
            return self._engine.evaluate(micro_batches, self._config.num_micro_batches)
        finally:
            context.documents, context.shares = training
