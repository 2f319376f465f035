"""The networks of the embedded world: small widths in the topology of Stable Diffusion 1.5, and its CLIP scorer."""

from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from slimstep.data.shapes_tokenizer import MAX_TOKENS
from slimstep.engine.files import whole_folder, write_json
from slimstep.models.pipeline import make_readable

LATENT_SIZE, RESOLUTION = 16, 64


def plain(config: DictConfig) -> dict:
    """Plain containers: diffusers cannot save OmegaConf's lists."""
    return OmegaConf.to_container(config, resolve=True)


def build_vae(config: DictConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=RESOLUTION, scaling_factor=1.0, **plain(config),
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal, trailing timesteps: fit for very few steps (Lin et al. 2023)."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, steps_offset=1,
    )  # fmt: skip


class VAEWithPosterior(nn.Module):
    """The VAE in one call, for training: reconstruction of a sample of the posterior, and the posterior."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstructions [B, C, H, W] in [-1, 1], or of videos, and the KL divergence to N(0, 1) per latent number."""
        posterior = self.vae.encode(images_BCHW).latent_dist
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return self.painted(posterior.sample(generator)), kl

    def painted(self, latents_BCHW: Tensor) -> Tensor:
        return self.vae.decode(latents_BCHW).sample


class TextToImage(nn.Module):
    """Text encoder and UNet, trained together: the caption is read by what has to be painted."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer, latent_channels: int) -> None:
        super().__init__()
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, projection_dim=config.text.hidden_size,
                **special, **plain(config.text),
            )
        )  # fmt: skip
        self.unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE, in_channels=latent_channels, out_channels=latent_channels, layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=config.text.hidden_size, **plain(config.model),
        ).to(memory_format=torch.channels_last)  # fmt: skip

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        text_BLE = self.text_encoder(ids_BL).last_hidden_state
        return self.unet(noisy_BCHW, t_B, text_BLE, return_dict=False)[0]


class TextEncoderWithNames(nn.Module):
    """The text encoder and, for its training alone, linear readings of a scene's attributes from the last token."""

    def __init__(self, text_encoder: CLIPTextModel, classes: list[int]) -> None:
        super().__init__()
        self.text_encoder, self.classes = text_encoder, classes
        self.names = nn.Linear(text_encoder.config.hidden_size, sum(classes))

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States [B, L, E] and logits per attribute."""
        states_BLE = self.text_encoder(ids_BL).last_hidden_state
        return states_BLE, self.names(states_BLE[:, -1]).split(self.classes, dim=1)


def build_pipeline(model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """An ordinary diffusers folder with float16 weights; turns the pipeline's weights to float16."""
    with whole_folder(folder) as aside:
        pipeline.to(dtype=torch.float16).save_pretrained(aside)
        make_readable(aside)


def scorer_config(config: DictConfig, tokenizer: CLIPTokenizer) -> dict:
    """An open_clip model configuration; the tokenizer is the one saved beside it."""
    text = {**plain(config.text_cfg), "vocab_size": len(tokenizer), "hf_tokenizer_name": "shapes"}
    return {"embed_dim": config.embed_dim, "vision_cfg": plain(config.vision_cfg), "text_cfg": text}


class ScorerWithNames(nn.Module):
    """The scorer and, for its training alone, linear readings of a scene's attributes from the image's embedding."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer, classes: list[int]) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(**scorer_config(config, tokenizer))
        self.names = nn.Linear(config.embed_dim, sum(classes))
        self.classes = classes

    def forward(self, images_BCHW: Tensor, ids_TL: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Unit embeddings of images and texts, the scale of their cosines, and logits per attribute."""
        image_BD, text_TD = self.clip.encode_image(images_BCHW), self.clip.encode_text(ids_TL, normalize=True)
        logits = self.names(image_BD).split(self.classes, dim=1)
        return F.normalize(image_BD, dim=1), text_TD, self.clip.logit_scale.exp(), logits


def save_scorer(scorer: open_clip.CLIP, config: DictConfig, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A folder for open_clip's `local-dir:`; images are normalised to [-1, 1] as in training."""
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    with whole_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
        state = {name: tensor.half().contiguous() for name, tensor in scorer.state_dict().items()}
        save_file(state, aside / "open_clip_model.safetensors")
        described = {"model_cfg": scorer_config(config, tokenizer), "preprocess_cfg": preprocess}
        write_json(aside / "open_clip_config.json", described)
        make_readable(aside)
