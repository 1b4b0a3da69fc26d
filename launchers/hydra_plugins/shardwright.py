"""Hydra looks for plugins in packages of this name only; the work is done in harness.launch.sweep.

No __init__.py stands beside this file: it would hide every other installed plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ShardwrightLauncher(Launcher):
    """Runs a batch of points, each as a `deepspeed` process tree; hands tokens per second back."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the sweep's name, and give its folder to Hydra, before any sweeper makes it."""
        from harness.launch.sweep import sweep_directory

        self.loader, self.collect, self.config = hydra_context.config_loader, task_function, config
        self.sweep = sweep_directory(config)
        config.hydra.sweep.dir = str(self.sweep.path)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """As `run_batch`."""
        from harness.launch.compose import Composer
        from harness.launch.sweep import run_batch

        composer = Composer(lambda overrides: self.loader.load_sweep_config(self.config, overrides))
        request = {"overrides": OmegaConf.to_container(self.config.hydra.overrides.task)}
        batch = run_batch(job_overrides, composer, self.sweep, request, first=initial_job_idx == 0)
        self.collect([point.status for point in batch])
        returns = []
        for point in batch:
            returns.append(JobReturn(overrides=list(point.overrides), status=JobStatus.COMPLETED))
            returns[-1].return_value = point.tokens_per_second
        return returns


class ShardwrightSweeper(Sweeper):
    """The product of all swept keys and `sweep.points`, in one batch that the launcher checks as a whole."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Expand the request and run it."""
        from harness.launch.compose import environment_as_text
        from harness.launch.points import expand

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        with environment_as_text():  # `__init__` got the values
            params, points = self.config.hydra.sweeper.params, self.config.sweep.points
            grid = expand(arguments, params, points, self.hydra_context.config_loader)
        return [self.launcher.launch(grid, initial_job_idx=0)]


store = ConfigStore.instance().store
store("shardwright", {"_target_": f"{__name__}.ShardwrightLauncher"}, group="hydra/launcher")
store("shardwright", {"_target_": f"{__name__}.ShardwrightSweeper", "params": {}}, group="hydra/sweeper")
