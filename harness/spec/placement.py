"""Which part of the model is where: the layers are cut into p v parts, and every stage holds v of them, its chunks.

Other tools call the parts virtual stages.

    loop (arXiv 2104.04473, figure 4)          V (arXiv 2405.15362)
    stage 0   part 0   part 3                  stage 0   part 0   part 5
    stage 1   part 1   part 4                  stage 1   part 1   part 4
    stage 2   part 2   part 5                  stage 2   part 2   part 3

In a V each second time the parts run back, so that the stage that ends one chunk begins the next, and between them
nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Parts of a model on the stages of a pipeline."""

    num_stages: int
    num_chunks: int = 1
    """Of every stage."""
    is_v: bool = False

    @property
    def num_parts(self) -> int:
        """Of the whole model."""
        return self.num_stages * self.num_chunks

    def part(self, stage: int, chunk: int) -> int:
        """Which part a chunk of a stage is."""
        turned = self.is_v and chunk % 2 == 1
        return chunk * self.num_stages + (self.num_stages - 1 - stage if turned else stage)

    def place(self, part: int) -> tuple[int, int]:
        """Stage and chunk of a part."""
        chunk, position = divmod(part, self.num_stages)
        turned = self.is_v and chunk % 2 == 1
        return (self.num_stages - 1 - position if turned else position), chunk

    def stage_of(self, part: int) -> int:
        """Stage of a part."""
        return self.place(part)[0]

    def parts_of(self, stage: int) -> list[int]:
        """The parts of a stage, by chunk."""
        return [self.part(stage, chunk) for chunk in range(self.num_chunks)]

    def begins(self, stage: int, chunk: int) -> bool:
        """Whether a chunk takes the samples."""
        return self.part(stage, chunk) == 0

    def ends(self, stage: int, chunk: int) -> bool:
        """Whether a chunk computes the loss."""
        return self.part(stage, chunk) == self.num_parts - 1
