"""What second stages learn from, which make a first one's picture larger (models/families/deepfloyd/cascade.py)."""

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimstep.engine.objective import Batch, Metrics, Objective, ObjectiveAround, PlainObjective
from slimstep.models.families.deepfloyd.cascade import degraded, first_stage_of


class OfPictures(ObjectiveAround):
    """An objective of a second stage: beside its images a batch has them as small as the first stage's pictures, made
    larger and noised, at a level and with noise of each step's own."""

    def __init__(self, objective: Objective | PlainObjective, pipeline: DiffusionPipeline):
        super().__init__(objective)
        self.pipeline = pipeline
        self.side = first_stage_of(pipeline).pipeline.unet.config.sample_size

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        shown = degraded(self.pipeline, self.side, batch["latents"], generator)
        return self.objective.loss(networks, {**batch, **shown}, generator, update)
