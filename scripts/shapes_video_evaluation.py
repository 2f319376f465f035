"""How good the bundled model of videos is: what stock diffusers draws, and how well that follows the captions.

Axes: B videos, C channels, F frames, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor
from torchvision.utils import save_image

from slimstep.data.shapes_video import ShapesVideoPairs, shapes_video_prompts
from slimstep.engine.seeding import generator
from slimstep.eval.metrics.moving_shapes import followed

BATCH = 16


def shares(videos_BFHW3: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """How many of the videos are right in each respect; the order counts those of two shapes."""
    rows = [followed(video, prompt) for video, prompt in zip(videos_BFHW3, prompts, strict=True)]
    names = ("colours", "shapes", "directions", "order", "all")
    each = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: round(sum(values) / len(values), 3) for name, values in each.items() if values}


def side_of(pipeline: WanPipeline) -> int:
    """In pixels, of the model's own videos."""
    return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor_spatial


def draw(pipeline: WanPipeline, prompts: Sequence[str], steps: int, guidance: float, seed: int, tokens: int) -> Tensor:
    """A video for each prompt by the stock pipeline's own call, uint8 [B, F, H, W, 3]; tokens: max_sequence_length."""
    config, side, videos = pipeline.transformer.config, side_of(pipeline), []
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    shape = (config.in_channels, frames, config.sample_size, config.sample_size)
    for indices in torch.arange(len(prompts)).split(BATCH):
        noise = torch.stack([torch.randn(shape, generator=generator("sample", seed, n)) for n in indices.tolist()])
        drawn = pipeline(
            [prompts[n] for n in indices], latents=noise, output_type="pt", num_inference_steps=steps, height=side,
            width=side, num_frames=config.sample_frames, guidance_scale=guidance, max_sequence_length=tokens,
        ).frames  # fmt: skip
        videos.append((drawn * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2))
    return torch.cat(videos)


def save_strips(videos_BFHW3: Tensor, path: Path) -> None:
    """The first 16 videos, one below the other, their frames side by side."""
    rows = torch.nn.functional.pad(videos_BFHW3[:16].permute(0, 4, 2, 1, 3), (1, 1, 0, 0, 1, 1), value=128)
    save_image(rows.flatten(3, 4).permute(1, 0, 2, 3).flatten(1, 2).float() / 255, path)


@torch.no_grad()
def through_video_vae(pipeline: WanPipeline, videos_BFHW3: Tensor) -> Tensor:
    painted = []
    for batch in videos_BFHW3.split(BATCH):
        x_BCFHW = batch.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        decoded = pipeline.vae.decode(pipeline.vae.encode(x_BCFHW).latent_dist.mode()).sample
        painted.append(((decoded / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1))
    return torch.cat(painted)


def evaluate_video(folder: Path, config: Mapping, pictures: Path) -> dict:
    """Every figure of the model of videos; `pictures` receives strips of frames for each setting."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pairs = ShapesVideoPairs("heldout", config["prompts"], config["seed"], side_of(pipeline))
    prompts = shapes_video_prompts("heldout", config["prompts"], config["seed"]).prompts
    real = torch.stack([pairs[index]["video"] for index in range(len(pairs))])
    shown = {"real": real, "real through VAE": through_video_vae(pipeline, real)}
    for steps, guidance, tokens in config["settings"]:
        name = f"{steps} steps, guidance {guidance}, max_sequence_length {tokens}"
        shown[name] = draw(pipeline, prompts, steps, guidance, config["seed"], tokens)
    pictures.mkdir(parents=True, exist_ok=True)
    for name, videos in shown.items():
        save_strips(videos, pictures / f"{name.replace(' ', '_').replace(',', '')}.png")
    error_B = ((shown["real through VAE"].float() - real.float()) / 255).square().mean((1, 2, 3, 4))
    followed_by = {name: shares(videos, prompts) for name, videos in shown.items()}
    report = {"prompts": len(prompts), "seed": config["seed"], "vae_psnr_db": float((-10 * error_B.log10()).mean())}
    return {**report, "followed": followed_by}
