"""How good the embedded world is: the scorer on real scenes, the VAE, and the samples as the scorer sees them.

Axes: B images, N scenes, D features, K wrong captions, H and W pixels.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from slimstep.data.making import cut
from slimstep.data.prompts import PromptSet
from slimstep.data.scene import Scene
from slimstep.data.shapes import ShapesPairs, caption, hard_negatives
from slimstep.eval.metrics.clip import ClipScorer, psnr
from slimstep.eval.sampling import Sampler
from slimstep.models.pipeline import load_pipeline

BATCH = 50


def heldout_scenes(n: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Held-out scenes and their images, uint8 [N, 3, 64, 64]."""
    pairs = ShapesPairs("heldout", n, seed)
    return [pairs.scene(index)[0] for index in range(n)], pairs.images(range(n))


def top1_of_100(scorer: ClipScorer, images_N3HW: Tensor, captions: Sequence[str]) -> float:
    """How often an image prefers its own caption to those of 99 other scenes; equal captions count as own."""
    hits = []
    for image_BD, text_BD, texts in zip(
        scorer.image(images_N3HW).split(100), scorer.text(captions).split(100), cut(captions, 100), strict=True
    ):
        best = (image_BD @ text_BD.T).argmax(1).tolist()
        hits += [texts[chosen] == texts[index] for index, chosen in enumerate(best)]
    return sum(hits) / len(hits)


def distinguished(scorer: ClipScorer, images_N3HW: Tensor, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Per kind of wrong caption: how often an image prefers its own (chance: one half), and of how many."""
    wrong = [hard_negatives(scene, turn=index) for index, scene in enumerate(scenes)]
    image_ND, own_ND = scorer.image(images_N3HW), scorer.text([caption(scene) for scene in scenes])
    rows = [row for row, texts in enumerate(wrong) for _ in texts]
    wrong_KD = scorer.text([text for texts in wrong for text in texts.values()])
    right_K = (image_ND[rows] * own_ND[rows]).sum(1) > (image_ND[rows] * wrong_KD).sum(1)
    outcomes = defaultdict(list)
    for name, right in zip((name for texts in wrong for name in texts), right_K.tolist(), strict=True):
        outcomes[name].append(right)
    return {name: {"accuracy": sum(right) / len(right), "n": len(right)} for name, right in outcomes.items()}


@torch.inference_mode()
def through_vae(pipeline, images_N3HW: Tensor) -> Tensor:
    """The images as the VAE gives them back, uint8."""
    painted = []
    for batch in images_N3HW.split(BATCH):
        latents = pipeline.vae.encode(batch.float() / 127.5 - 1).latent_dist.mean
        image = (pipeline.vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
        painted.append((image * 255).round().to(torch.uint8))
    return torch.cat(painted)


def sample(sampler: Sampler, prompts: PromptSet) -> Tensor:
    """One image per prompt, uint8 [N, 3, H, W]."""
    batches = torch.arange(len(prompts)).split(BATCH)
    return torch.cat([sampler.images(sampler.pipeline.unet, prompts.prompts, batch.tolist()) for batch in batches])


def evaluate_assets(assets: Path, config, pictures: Path) -> dict:
    """Every figure of the bundled models; `pictures` receives a grid of samples per guidance scale."""
    scorer, pipeline = ClipScorer(f"local-dir:{assets / 'shapes-clip'}"), load_pipeline(assets / "shapes")
    scenes, images = heldout_scenes(config.scenes, config.seed)
    captions = [caption(scene) for scene in scenes]
    report = {
        "scenes": len(scenes), "seed": config.seed,
        "top1_of_100": top1_of_100(scorer, images, captions),
        "vae_psnr_db": float(psnr(through_vae(pipeline, images), images).mean()),
        "prompts": config.prompts, "steps": config.steps, "clip": {}, "told_apart": {},
    }  # fmt: skip
    scenes, images = scenes[: config.prompts], images[: config.prompts]
    prompts = PromptSet(tuple(captions[: config.prompts]), "heldout")
    shown = {"real": images, "real through VAE": through_vae(pipeline, images)}
    for guidance in config.guidance:
        shown[f"guidance {guidance}"] = sample(Sampler(pipeline, config.steps, guidance, config.seed), prompts)
    text_ND = scorer.text(prompts.prompts)
    pictures.mkdir(parents=True, exist_ok=True)
    for name, images in shown.items():
        report["clip"][name] = mean_and_error(scorer.score(images, text_ND))
        report["told_apart"][name] = distinguished(scorer, images, scenes)
        save_grid(images, pictures / f"{name.replace(' ', '_')}.png")
    return report


def mean_and_error(score_N: Tensor) -> dict[str, float]:
    return {"mean": float(score_N.mean()), "se": float(score_N.std() / len(score_N) ** 0.5)}


def save_grid(images_N3HW: Tensor, path: Path) -> None:
    """The first 64 images, at twice their size."""
    grid = make_grid(images_N3HW[:64].float() / 255, nrow=8, padding=2, pad_value=0.5)
    save_image(grid.repeat_interleave(2, 1).repeat_interleave(2, 2), path)
