"""What is seen of a student while it is trained: images of the calibration prompts, scored and kept as pictures."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor, nn

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.eval.evaluator import picture, write_pictures
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.compare import mean_and_error
from slimstep.eval.metrics.video import features_of
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.pipeline import on_device

PREVIEWS = "previews"
MAX_PICTURES = 8


@dataclass(eq=False)
class ImageMonitor:
    """The CLIP score of what the student draws of prompts that it is not evaluated on, in its own steps.

    The first pictures lie in STAGE/previews/step-00000100/000.png …, and go to the tracker. Without a scorer there are
    pictures alone.
    """

    sampler: Sampler
    prompts: PromptSet
    scorer: ClipScorer | None
    run: Run
    stage: str
    batch_size: int
    pictures: int

    @property
    def best_by(self) -> str | None:
        return "clip" if self.scorer else None

    @cached_property
    def cond(self) -> Conditioning:
        return self.sampler.encode(self.prompts.prompts)

    def __call__(self, student: nn.Module, step: int) -> dict[str, float]:
        codec, scorer, device = self.sampler.codec, self.scorer, next(student.parameters()).device

        def draw(indices: list[int]) -> Tensor:
            return self.sampler.decode(self.sampler.latents_at(student, self.cond.rows(indices), indices)).cpu()

        with ExitStack() as stack:
            for network in filter(None, (codec, scorer and scorer.model)):
                stack.enter_context(on_device(network, device))
            accelerator, desc = self.run.accelerator, f"{self.stage}: images after {step} steps"
            images = map_batches(draw, len(self.prompts), self.batch_size, accelerator, desc)
            values = self.scores(images)
        self.keep_pictures(images[: min(self.pictures, MAX_PICTURES)], step)
        return values

    def scores(self, images_B3HW: Tensor) -> dict[str, float]:
        if self.scorer is None:
            return {}
        image_BD, text_BD = features_of(self.scorer, images_B3HW), self.scorer.text(self.prompts.prompts)
        clip = mean_and_error(self.scorer.similarity(image_BD, text_BD).tolist())
        return {"clip": clip.mean, "clip_se": clip.se}

    def keep_pictures(self, images_B3HW: Tensor, step: int) -> None:
        name = f"{self.stage}/{PREVIEWS}"
        self.run.folder(f"{name}/step-{step:08d}", lambda folder: write_pictures(images_B3HW, folder))
        if self.run.tracker:
            pictures: list[Image.Image] = [picture(image) for image in images_B3HW]
            captions = [f"{step} steps: {prompt}" for prompt in self.prompts.prompts[: len(pictures)]]
            self.run.tracker.images(name, pictures, captions)
