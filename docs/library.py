"""slimstep as a library, without Hydra and runs: value blocks, prune by hand, time, distil steps, evaluate, export."""

import torch
from torch.utils.data import DataLoader

from slimstep import ROOT
from slimstep.data.cache import cache_pairs
from slimstep.data.shapes import ShapesPairs, shapes_prompts
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import StepSchedule
from slimstep.eval.config import LatencyConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.latency import compare_ms
from slimstep.models.family import denoiser_of
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.prune.scores import score_blocks

pipeline, prompts = load_pipeline(ROOT / "assets/shapes"), shapes_prompts("heldout", 8, seed=0)
teacher, clip = pipeline.unet.requires_grad_(False), ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip")
scores = score_blocks(teacher, Sampler(pipeline, 2, 2.5), clip, prompts, batch_size=32)
lost = dict(zip(scores.blocks, scores.loss_NP.mean(1).tolist(), strict=True))
cheapest = sorted(lost, key=lost.get)[:3]  # CLIP score lost without the block
student = teacher.with_architecture(dict.fromkeys(cheapest, 0))
print(cheapest, compare_ms({"teacher": teacher, "student": student}, LatencyConfig(iterations=5), teacher.device))

pairs, schedule = cache_pairs(ShapesPairs("train", 32, seed=0), pipeline, "cache"), schedule_of(pipeline.scheduler)
denoiser, halved = denoiser_of(teacher, "v_prediction"), StepSchedule(pipeline.scheduler, 2, pipeline.scheduler, 1)
loss_of = StepDistillation(denoiser, schedule, pairs.unconditional, teacher, halved)
optimizer, generator = torch.optim.AdamW(student.requires_grad_().parameters(), 1e-4), torch.Generator().manual_seed(0)
for batch in DataLoader(pairs, batch_size=8):
    loss, _ = loss_of(student, batch, generator)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
images = [Sampler(pipeline, n, 2.5).images(unet, prompts.prompts, range(8)) for unet, n in ((teacher, 2), (student, 1))]
print(paired_difference(clip(images[1], prompts.prompts).tolist(), clip(images[0], prompts.prompts).tolist()))
print(export_pipeline(with_unet(pipeline, student), "export").load)
