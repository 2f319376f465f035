"""Exports and their teacher side by side: one prompt, the same noise, every model's image and its time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from slimstep.eval.hub import run_of, teacher_of
from slimstep.eval.record import read_evaluation
from slimstep.eval.sampling import Sampler
from slimstep.models.card import EXPORT_REPORT, origin_of
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline, to_device

TEACHER = "teacher"
UNFINISHED = "evolved"  # the export of prune_unet's before it is recovered


@dataclass(frozen=True)
class SideModel:
    """A model of the page: where it is loaded from, and how it is sampled."""

    name: str
    path: str
    steps: int
    guidance_scale: float
    max_sequence_length: int | None = None

    @property
    def setting(self) -> str:
        return f"{self.steps} step{'s' * (self.steps > 1)}, guidance {self.guidance_scale:g}"

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return to_device(load_pipeline(self.path, max_sequence_length=self.max_sequence_length), device)

    def draw(self, prompt: str, seed: int) -> tuple[Tensor, float]:
        """The image uint8 [3, H, W], or a video [F, H, W, 3], from the seed's noise, which is that of every model with
        latents of this shape; and its seconds, from the prompt's text on."""
        sampler = Sampler(self.pipeline, self.steps, self.guidance_scale, seed)
        start = time.perf_counter()
        (image,) = sampler.images(network_of(self.pipeline), [prompt], [0]).cpu()  # waits for a GPU
        return image, time.perf_counter() - start

    def warm_up(self) -> None:
        """Loads the model and draws once, where that has not been, so that no image pays for what is made once."""
        if "pipeline" not in vars(self):
            self.draw("", 0)


def side_models(paths: Sequence[Path]) -> list[SideModel]:
    """The teacher of the first, as its run sampled it, and all exports: those named, and all in the runs that are
    named, most steps first. ValueError for folders that hold none, and for exports of several teachers."""
    exports = [export for path in paths for export in exports_in(path)]
    origins = [origin_of(export) for export in exports]
    if len(teachers := sorted({origin.teacher for origin in origins})) > 1:
        raise ValueError(f"these are students of several teachers, {', '.join(teachers)}: show them apart")
    first = run_of(exports[0])
    if not (evaluation := read_evaluation(first)):
        raise ValueError(f"{first} has no evaluation.json, which says how its teacher is sampled: let it finish")
    reference, length = teacher_of(evaluation), origins[0].max_sequence_length
    teacher = SideModel(TEACHER, origins[0].teacher, reference.steps, reference.sampled_guidance, length)
    students = [SideModel(name_of(export), str(export), origin.steps, origin.guidance_scale, length)
                for export, origin in zip(exports, origins, strict=True)]  # fmt: skip
    return [teacher, *students]


def exports_in(folder: Path) -> list[Path]:
    """The folder itself, or those in the run that it is."""
    found = [folder] if origin_of(folder) else [f.parent for f in folder.glob(f"**/{EXPORT_REPORT}")]
    found = [export for export in found if export == folder or export.name != UNFINISHED and origin_of(export)]
    if not found:
        raise ValueError(f"{folder} holds no export of slimstep's; name a finished run, or an export in it")
    return sorted(found, key=lambda export: (-origin_of(export).steps, str(export)))


def name_of(export: Path) -> str:
    """The run's name, and the stage's where it has several."""
    run, stage = run_of(export), export.resolve().parent
    return run.name if stage == run else f"{run.name} {stage.name}"
