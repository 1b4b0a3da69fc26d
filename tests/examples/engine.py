"""An engine: plain torch on one rank, with a constant learning rate and a count of its tokens."""

from collections.abc import Callable, Iterator

from torch import Tensor

from harness.errors import ConfigError
from harness.record.heartbeat import Phase
from harness.run.data import MicroBatch
from harness.run.engines.torch.engine import TorchEngine
from harness.spec.config import RunConfig
from harness.spec.engines import EngineKind, check_torch


class CountingEngine(TorchEngine):
    """Knows how many tokens it has seen."""

    num_tokens = 0

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train and count."""
        self.num_tokens += self.config.train.global_batch_size * self.config.train.sequence_length
        return super().train_step(data)


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> CountingEngine:
    """As every engine's module has it."""
    return CountingEngine(config, lambda step: config.train.learning_rate, weights, phase=phase)


def check(config: RunConfig) -> None:
    """Refuse several ranks, and what no engine of torch's has."""
    check_torch(config)
    if config.parallel.pp > 1:
        raise ConfigError(f"parallel.engine=counting runs one rank, not parallel.pp={config.parallel.pp}; use pp 1")


ENGINE = EngineKind(module=__name__, check=check)
