"""A model as DeepSpeed's `PipelineModule`, cut where the harness says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from harness.model.assembly import LayerDescription
from harness.spec.placement import Placement


class PartedPipeline(PipelineModule):  # type: ignore[misc]  # deepspeed has no types
    """A `PipelineModule` whose stages hold the given parts, and whose parameters know their global names.

    Args:
        boundaries: index of each part's first layer, and of the end.
    """

    def __init__(
        self, layers: list[LayerDescription], boundaries: list[int], placement: Placement, **arguments: Any
    ) -> None:
        self._boundaries, self._placement = boundaries, placement
        self._names = [layer.name for layer in layers]
        self._functions: list[list[Any]] = []
        self.forward_funcs: list[Any]
        super().__init__(layers=[_layer_spec(layer) for layer in layers], **arguments)

    def _partition_layers(self, method: str = "") -> None:
        """Called by `PipelineModule` while it is built."""
        self._set_bounds(0, len(self._names))

    def _build(self) -> None:
        """Called by `PipelineModule`: the layers of each chunk."""
        for part in self._placement.parts_of(self.stage_id):
            self._set_bounds(self._boundaries[part], self._boundaries[part + 1])
            super()._build()
            self._functions.append(self.forward_funcs)
            self.forward_funcs = []

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that holds a layer; `PipelineModule` asks for that of tied ones."""
        part = next(part for part, end in enumerate(self._boundaries[1:]) if layer_idx < end)
        return self._placement.stage_of(part)

    def forward(self, hidden: Tensor, chunk: int = 0) -> Tensor:
        """What the layers of a chunk make of their input."""
        for function in self._functions[chunk]:
            hidden = function(hidden)
        return hidden

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
