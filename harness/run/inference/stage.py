"""This rank's part of a model that generates: its layers, their cache, and on the last stage what chooses tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from harness.model.assembly import build_steps, describe_layers, part_boundaries
from harness.model.cache import KeyValueCache
from harness.model.context import PassContext
from harness.model.emulated import set_stage
from harness.model.groups import build_tensor_parallel
from harness.model.packing import pack_matrices
from harness.model.precision import dtype_of
from harness.model.products import use_onednn
from harness.model.sampling import Sampler
from harness.record.heartbeat import Phase, no_phase
from harness.run.engines.engine import device_of_rank, filling
from harness.run.weights import fill_parameters
from harness.spec.batching import Work
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.kv_cache import cache_shape, longest_sequence
from harness.spec.partition import layers_per_part


class Stage:
    """The layers of one stage on one tensor-parallel rank. Built by all ranks at once.

    Args:
        prompts: tokens of each request.
        num_slots: sequences at a time, that get token after token; None: passes over whole rows, of which nothing is
            kept and no token is chosen.
        weights: full parameter by global name; None: those of the configuration.
        phase: told what is done next, parameter by parameter.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        prompts: Sequence[Sequence[int]],
        num_slots: int | None,
        weights: Callable[[str], Tensor] | None = None,
        phase: Phase = no_phase,
    ) -> None:
        model, parallel = config.model, config.parallel
        self.config, self.topology, self.device = config, parallel.topology, device_of_rank()
        self.dtype, self._prompts = dtype_of(config.train.precision), prompts
        place = self.topology.coordinate(rank)
        self.index, self.is_first, self.is_last = place.pp, place.pp == 0, place.pp == parallel.pp - 1
        phase("building the model")
        use_onednn(model.onednn)
        self.tp = build_tensor_parallel(self.topology, rank, model.num_key_value_heads)
        self.context = PassContext(config.train.seed)
        layers = describe_layers(model, self.tp, context=self.context)
        self.blocks_per_part = layers_per_part(model, parallel, config.train.sequence_length)
        bounds = part_boundaries(layers, self.blocks_per_part)
        own = layers[bounds[place.pp] : bounds[place.pp + 1]]
        if model.part == "layer":
            own = [layer for layer in own if layer.name == "blocks.0"]
        self.takes_hidden = not self.is_first or model.part == "layer"
        built: dict[str, nn.Module] = {}
        steps = build_steps(own, built)
        last_block = max(i for i, layer in enumerate(own) if layer.name.startswith("blocks."))
        self._steps, self._tail = steps[: last_block + 1], steps[last_block + 1 :]
        self._built = built
        for module in built.values():
            module.to(self.device, self.dtype).eval()
            if isinstance(model, EmulatedModel):
                set_stage(module, model, place.pp)
        fill_parameters(filling(self.parameters(), phase), config, self.tp, weights)
        phase("packing the weights")
        pack_matrices(
            nn.ModuleList(built.values()),
            config.generate.quantization,
            has_tied_head=model.tie_word_embeddings and bool(self._tail),
            embeds=self.is_first,
        )
        self.scored: Callable[[Work, Tensor], object] = lambda *_: None
        """Told of the scores of a pass before a token is chosen, on the last stage: [rows, length, columns] of this
        rank's tokens, of the rows that choose and their last positions, or of all where none is chosen."""
        self.cache: KeyValueCache | None = None
        self._seen: Tensor | None = None
        self._sampler = Sampler(config.generate, model.vocab_size, self.tp)
        if num_slots is not None:
            blocks = [f"{layer.name}.attention" for layer in own if layer.name.startswith("blocks.")]
            self._keep(blocks if model.architecture.computes else [], num_slots)

    def _keep(self, blocks: Sequence[str], num_slots: int) -> None:
        """Make memory for what sequences have."""
        model = self.config.model
        num_positions = longest_sequence(self.config, [*map(len, self._prompts)])
        shape = cache_shape(self.config, num_slots, num_positions)
        self.cache = KeyValueCache(blocks, shape, num_positions, model.sliding_window, self.dtype, self.device)
        self.context.cache = self.cache
        if self.is_last and self.config.generate.repetition_penalty != 1:
            columns = model.padded_vocab_size(self.tp.size) // self.tp.size
            self._seen = torch.zeros((num_slots, columns), dtype=torch.bool, device=self.device)

    @property
    def num_cache_bytes(self) -> int:
        """Of all keys and values of this rank."""
        return 0 if self.cache is None else self.cache.num_bytes

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with names that are the same in every layout."""
        for name, module in self._built.items():
            for path, parameter in module.named_parameters():
                yield f"{name}.{path}", parameter

    @torch.inference_mode()
    def run(self, work: Work, inputs: Tensor) -> Tensor:
        """A pass: tokens [rows, length] or hidden states in, hidden states [rows, length, hidden] or tokens out.

        Args:
            work: what passes; a row that is shorter than the longest is filled up.

        Returns:
            Of the last stage the tokens that are chosen, [rows that choose], on the CPU.
        """
        if self.cache is not None:
            self.cache.begin(work.rows, work.length)
        hidden = inputs
        for step in self._steps:
            hidden = step(hidden)
        if not self.is_last:
            return hidden
        if self.cache is not None:
            return self._choose(work, hidden)
        for step in self._tail:
            hidden = step(hidden)
        self.scored(work, hidden)
        return torch.empty(0, dtype=torch.int64)

    def _choose(self, work: Work, hidden: Tensor) -> Tensor:
        """The next token of each row whose prompt is done, from the scores of its last position."""
        choosing = [(i, row) for i, row in enumerate(work.rows) if row.chooses]
        self._note_prompts(work)
        if not choosing:
            return torch.empty(0, dtype=torch.int64)
        if work.length > 1 or len(choosing) < len(work.rows):
            rows = torch.tensor([i for i, _ in choosing], device=self.device)
            ends = torch.tensor([row.end - row.start - 1 for _, row in choosing], device=self.device)
            hidden = hidden[rows, ends].unsqueeze(1)
        for step in self._tail:
            hidden = step(hidden)
        self.scored(work, hidden)
        seen = None
        if self._seen is not None:
            slots = torch.tensor([row.slot for _, row in choosing], device=self.device)
            seen = self._seen[slots]
        chosen = self._sampler.choose(
            hidden.squeeze(1), [row.request for _, row in choosing], [row.end for _, row in choosing], seen
        )
        if self._seen is not None:
            self._see(slots, chosen)
        return chosen.cpu()

    def _note_prompts(self, work: Work) -> None:
        """Of sequences that enter: forget what their slots' last ones had, and note their prompts."""
        if self._seen is None:
            return
        for row in work.rows:
            if row.start == 0:
                self._seen[row.slot] = False
                prompt = torch.tensor(self._prompts[row.request], device=self.device)
                self._see(torch.full_like(prompt, row.slot), prompt)

    def _see(self, slots: Tensor, tokens: Tensor) -> None:
        assert self._seen is not None
        columns = tokens - self.tp.rank * self._seen.shape[1]
        own = (columns >= 0) & (columns < self._seen.shape[1])
        self._seen[slots[own], columns[own]] = True
