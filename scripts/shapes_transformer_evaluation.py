"""How good the bundled transformer is, and what each of its blocks is worth: CLIP scores of what stock diffusers draws.

Axes: B images, N prompts, C channels, H and W pixels or latents.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from scripts.shapes_evaluation import BATCH, distinguished, heldout_scenes, mean_and_error, save_grid, through_vae
from slimstep.data.shapes import caption
from slimstep.engine.seeding import generator
from slimstep.eval.metrics.clip import ClipScorer


def noise(pipeline: StableDiffusion3Pipeline, indices: Sequence[int], seed: int) -> Tensor:
    """Unit noise [B, C, H, W]; that of image i is the sampler's (eval/sampling.py)."""
    config = pipeline.transformer.config
    shape = config.in_channels, config.sample_size, config.sample_size
    return torch.stack([torch.randn(shape, generator=generator("sample", seed, index)) for index in indices])


def draw(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], steps: int, guidance: float, seed: int, padding: int
) -> Tensor:
    """One image for each prompt by the stock pipeline's own call, uint8 [N, 3, H, W]; padding: max_sequence_length."""
    images = []
    for indices in torch.arange(len(prompts)).split(BATCH):
        drawn = pipeline(
            [prompts[index] for index in indices], latents=noise(pipeline, indices.tolist(), seed), output_type="pt",
            num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=padding,
        ).images  # fmt: skip
        images.append((drawn * 255).round().to(torch.uint8))
    return torch.cat(images)


@contextmanager
def without_block(transformer: SD3Transformer2DModel, index: int) -> Iterator[None]:
    """The transformer passes its input by this block, as diffusers' `skip_layers` says."""
    transformer.forward = functools.partial(transformer.forward, skip_layers=[index])
    try:
        yield
    finally:
        del transformer.forward


def block_losses(
    pipeline: StableDiffusion3Pipeline, scorer: ClipScorer, prompts: Sequence[str], config, seed: int, padding: int
) -> list[dict[str, float]]:
    """For each block the CLIP score lost without it, paired over prompts."""
    text_ND = scorer.text(prompts)

    def scored() -> Tensor:
        return scorer.score(draw(pipeline, prompts, config.steps, config.guidance, seed, padding), text_ND)

    whole_N, losses = scored(), []
    for index in range(len(pipeline.transformer.transformer_blocks)):
        with without_block(pipeline.transformer, index):
            losses.append({"block": index, **mean_and_error(whole_N - scored())})
    return losses


def evaluate_transformer(assets: Path, config, pictures: Path) -> dict:
    """Every figure of the transformer; `pictures` receives a grid of samples per setting."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets / "shapes-dit", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scorer = ClipScorer(f"local-dir:{assets / 'shapes-clip'}")
    scenes, images = heldout_scenes(config.prompts, config.seed)
    prompts = [caption(scene) for scene in scenes]
    shown = {"real": images, "real through VAE": through_vae(pipeline, images)}
    settings = [(config.steps, guidance, config.padding) for guidance in config.guidance]
    settings += [(steps, config.blocks.guidance, config.padding) for steps in config.few_steps]
    settings += [(config.steps, config.blocks.guidance, 1)]
    for steps, guidance, padding in settings:
        name = f"{steps} steps, guidance {guidance}, max_sequence_length {padding}"
        shown[name] = draw(pipeline, prompts, steps, guidance, config.seed, padding)
    text_ND = scorer.text(prompts)
    report = {"prompts": len(prompts), "seed": config.seed, "clip": {}, "distinguished": {}}
    pictures.mkdir(parents=True, exist_ok=True)
    for name, images in shown.items():
        report["clip"][name] = mean_and_error(scorer.score(images, text_ND))
        report["distinguished"][name] = distinguished(scorer, images, scenes)
        save_grid(images, pictures / f"{name.replace(' ', '_').replace(',', '')}.png")
    losses = block_losses(pipeline, scorer, prompts[: config.blocks.prompts], config.blocks, config.seed, 1)
    clear = sum(abs(loss["mean"]) > 2 * loss["se"] for loss in losses)
    return {**report, "blocks": {**config.blocks, "lost": losses, "beyond_two_errors": clear}}
