"""A model as DeepSpeed's `PipelineModule`, cut where the harness says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from harness.model.assembly import LayerDescription


class StagedPipeline(PipelineModule):  # type: ignore[misc]  # deepspeed has no types
    """A `PipelineModule` whose stage boundaries are given, and whose parameters know their global names."""

    def __init__(self, layers: list[LayerDescription], boundaries: list[int], **arguments: Any) -> None:
        self._boundaries = boundaries
        self._names = [layer.name for layer in layers]
        super().__init__(layers=[_layer_spec(layer) for layer in layers], **arguments)

    def _partition_layers(self, method: str = "") -> None:
        """Called by `PipelineModule` while it is built."""
        self.parts = self._boundaries
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with names that are the same in every layout."""
        for name, parameter in self.named_parameters():
            head, rest = name.split(".", 1)
            if head == "tied_modules":  # tied_modules.<key>.<path>; the key is the first layer's name
                yield rest, parameter
            else:
                yield f"{self._names[int(head)]}.{rest}", parameter


def _layer_spec(layer: LayerDescription) -> LayerSpec:
    if layer.tied_key is None:
        return LayerSpec(layer.module_class, *layer.args)
    return TiedLayerSpec(layer.tied_key, layer.module_class, *layer.args, forward_fn=layer.forward)


def stage_boundaries(layers: list[LayerDescription], blocks_per_stage: list[int]) -> list[int]:
    """Index of each stage's first layer, and of the end: embeddings go first, norm and head last."""
    first_block = next(i for i, layer in enumerate(layers) if layer.name.startswith("blocks."))
    boundaries = [0]
    for blocks in blocks_per_stage[:-1]:
        boundaries.append((boundaries[-1] or first_block) + blocks)
    return [*boundaries, len(layers)]
