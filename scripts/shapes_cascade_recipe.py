"""The recipe of the cascade of scripts/shapes_cascade.py: a text encoder, two stages, and what they draw.

Both are pixel-space UNets that predict a variance, too, and are saved as a stock `IFPipeline` and an
`IFSuperResolutionPipeline`. The T5 encoder that they share learns to read captions before them, and is frozen.

Axes: B batch, C channels, H and W pixels, L text tokens, E text width.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from scripts.shapes_evaluation import heldout_scenes, mean_and_error, sample, save_grid
from scripts.shapes_models import plain, save_pipeline
from scripts.shapes_objectives import (
    NUM_CLASSES,
    Batch,
    CaptionReading,
    Metrics,
    ReadingObjective,
    Scenes,
    to_unit_range,
)
from scripts.shapes_recipe import load_newest
from slimstep.data.prompts import PromptSet
from slimstep.data.shapes import ShapesPairs, caption
from slimstep.data.shapes_tokenizer import MAX_TOKENS, WORDS
from slimstep.engine.config import TrainConfig
from slimstep.engine.files import write_json
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.families.deepfloyd.cascade import degraded, refines
from slimstep.models.families.deepfloyd.denoiser import DeepFloydDenoiser
from slimstep.models.noise_schedule import add_noise, eps_of, schedule_of, target_of
from slimstep.models.pipeline import load_pipeline

FOLDERS = {"first": "IF-I", "second": "IF-II"}
BOUND_WEIGHT = 1e-3  # of the variational bound (Nichol & Dhariwal 2021, section 3.1)
# The published stages' schedulers: DeepFloyd/IF-I-M-v1.0 and IF-II-M-v1.0.
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
             "dynamic_thresholding_ratio": 0.95}  # fmt: skip
WITHOUT = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}


# ---- the networks ----


def build_t5_tokenizer(max_tokens: int = NUM_TOKENS) -> T5TokenizerFast:
    """T5's kind of tokenizer, in which every word of the captions is one token, and other text goes by letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [(f"▁{word}", -1.0) for word in WORDS] + [("▁", -10.0), *((letter, -10.0) for letter in letters)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_tokens)


def build_unet(config: DictConfig, text_width: int, refines: bool) -> UNet2DConditionModel:
    """IF's blocks: `attends` says in which levels they attend, outermost first, each to picture and text."""
    fields = plain(config)
    attends = fields.pop("attends")
    # IF-II's ResNets divide what they add up, and it takes the picture's noise level as its class.
    own = {"in_channels": 6, "class_embed_type": "timestep", "resnet_out_scale_factor": 2**0.5,
           "mid_block_scale_factor": 2**0.5, "resnet_skip_time_act": True}  # fmt: skip
    return UNet2DConditionModel(
        out_channels=6, norm_num_groups=8, act_fn="gelu", cross_attention_dim=text_width,
        cross_attention_norm="group_norm", encoder_hid_dim=text_width, addition_embed_type="text",
        addition_embed_type_num_heads=4, resnet_time_scale_shift="scale_shift",
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", **(own if refines else {"in_channels": 3}), **fields,
    )  # fmt: skip


class CaptionReader(nn.Module):
    """T5 and, for its training alone, linear readings of a scene's attributes from a caption's end token.

    Its stack of layers, that is, for the model around that has the embedding twice, and no file holds a tensor twice.
    """

    def __init__(self, text_encoder: T5EncoderModel, classes: list[int]) -> None:
        super().__init__()
        self.text_encoder, self.classes = text_encoder.encoder, classes
        self.names = nn.Linear(text_encoder.config.d_model, sum(classes))

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States [B, L, E] and logits per attribute."""
        own_BL = ids_BL != self.text_encoder.config.pad_token_id
        states_BLE = self.text_encoder(ids_BL, attention_mask=own_BL).last_hidden_state
        end_BE = states_BLE[torch.arange(len(ids_BL)), own_BL.sum(1) - 1]
        return states_BLE, self.names(end_BE).split(self.classes, dim=1)


# ---- what they learn ----


def step_divergence(scheduler: DDPMScheduler, error_BCHW: Tensor, variance_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """[B, C, H, W]: nats by which the network's step at timestep t differs from the true one, given x_0.

    That is KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) (Nichol & Dhariwal 2021, equations 5 and 15), where the network
    errs by `error` in its noise, and says by `variance`, from −1 to 1, where the logarithm of its variance lies between
    those of β̃ and β. It is 0 at t = 0, where samplers add no noise.
    """
    at_B = t_B.clamp(min=1)
    beta, bar, bar_before = (
        table.to(error_BCHW.device)[index].view(-1, 1, 1, 1)
        for table, index in (
            (scheduler.betas, at_B), (scheduler.alphas_cumprod, at_B), (scheduler.alphas_cumprod, at_B - 1)
        )
    )  # fmt: skip
    true = beta * (1 - bar_before) / (1 - bar)
    share = (variance_BCHW + 1) / 2
    log_variance = share * beta.log() + (1 - share) * true.log()
    moved = beta / ((1 - beta) * (1 - bar)).sqrt() * error_BCHW
    divergence = (log_variance - true.log() + (true + moved**2) / log_variance.exp() - 1) / 2
    return torch.where(t_B.view(-1, 1, 1, 1) > 0, divergence, 0)


class HybridDenoising:
    """A stage's prediction, and its variance by the variational bound, which moves that alone (Nichol & Dhariwal 2021,
    equation 16). Some captions are emptied, for classifier-free guidance.

    The pipeline's own T5 encodes. A second stage sees the pictures small and noised, as in the pruning jobs; `crop`
    pixels of them in `crop_share` of the batches, for most of what it does is local.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, first_side: int, caption_dropout: float, crop: int | None, crop_share: float
    ) -> None:
        self.pipeline, self.first_side = pipeline, first_side
        self.caption_dropout, self.crop, self.crop_share = caption_dropout, crop, crop_share
        self.schedule = schedule_of(pipeline.scheduler)
        side = pipeline.unet.config.sample_size
        self.denoiser = DeepFloydDenoiser(self.schedule.prediction_type, (3, side, side), keeps_variance=True)

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        draw = {"generator": generator, "device": generator.device}
        x0_BCHW = to_unit_range(batch["image"])
        dropped = (torch.rand(len(x0_BCHW), **draw) < self.caption_dropout).tolist()
        captions = ["" if empty else text for text, empty in zip(batch["caption"], dropped, strict=True)]
        with torch.no_grad():
            tensors = {"text": self.pipeline.encode_prompt(captions, False, device=generator.device)[0]}
        if refines(self.pipeline):
            tensors |= degraded(self.pipeline, self.first_side, x0_BCHW, generator)
            x0_BCHW, tensors["upscaled"] = self.cropped(x0_BCHW, tensors["upscaled"], draw)
        else:
            x0_BCHW = F.interpolate(x0_BCHW, (self.first_side, self.first_side), mode="area")
        t_B = self.schedule.sample_times(len(x0_BCHW), generator)
        noise_BCHW = torch.randn(x0_BCHW.shape, **draw)
        level, kind = self.schedule.alpha_sigma(t_B), self.schedule.prediction_type
        x_t = add_noise(x0_BCHW, noise_BCHW, level)
        pred_BCHW, variance_BCHW = self.denoiser(unet, x_t, t_B, Conditioning(tensors)).chunk(2, dim=1)
        simple = F.mse_loss(pred_BCHW, target_of(x0_BCHW, noise_BCHW, level, kind))
        error_BCHW = eps_of(pred_BCHW.detach(), x_t, level, kind) - noise_BCHW
        bound = step_divergence(self.pipeline.scheduler, error_BCHW, variance_BCHW, t_B).mean()
        metrics = {"simple": simple, "bound": bound}
        return simple + BOUND_WEIGHT * len(self.schedule) * bound, metrics  # the bound sums over all timesteps

    def cropped(self, x0_BCHW: Tensor, upscaled_BCHW: Tensor, draw: dict) -> tuple[Tensor, Tensor]:
        if self.crop is None or torch.rand((), **draw) >= self.crop_share:
            return x0_BCHW, upscaled_BCHW
        top, left = torch.randint(x0_BCHW.shape[-1] - self.crop + 1, (2,), **draw).tolist()
        window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        return x0_BCHW[window], upscaled_BCHW[window]


# ---- the recipe ----


class CascadeRecipe:
    """The stages; each leaves files under `root`, and what exists is not made again."""

    def __init__(self, config: DictConfig) -> None:
        self.config, self.root = config, Path(config.root)
        self.accelerator = Accelerator(mixed_precision="no")
        self.tokenizer = build_t5_tokenizer()

    def train(self, model: nn.Module, objective, data: Scenes, stage: str) -> None:
        run = Run(self.root / stage, self.accelerator, seed=self.config.seed)
        train(model, objective, data, TrainConfig(**plain(self.config[stage].train)), run, "train")

    def pairs(self, stage: str) -> ShapesPairs:
        return ShapesPairs("train", self.config[stage].scenes, self.config.seed)

    def text_encoder(self) -> T5EncoderModel:
        torch.manual_seed(self.config.seed)
        vocabulary = {"vocab_size": len(self.tokenizer), "dropout_rate": 0.0}
        return T5EncoderModel(T5Config(**vocabulary, **plain(self.config.text.model)))

    def text(self) -> None:
        tokenizer = build_t5_tokenizer(MAX_TOKENS)  # the states of a caption's own tokens do not depend on the padding
        reader = CaptionReader(self.text_encoder(), NUM_CLASSES)
        self.train(reader, ReadingObjective(None), CaptionReading(self.pairs("text"), tokenizer), "text")

    def pipeline(self, stage: str) -> DiffusionPipeline:
        """The stock pipeline of `first` or `second`, as far as it is trained."""
        text_encoder = self.text_encoder().to(self.accelerator.device)
        load_newest(CaptionReader(text_encoder, NUM_CLASSES), self.root / "text/train")
        text_encoder.eval().requires_grad_(False)
        unet = build_unet(self.config[stage].model, self.config.text.model.d_model, stage == "second")
        load_newest(unet, self.root / stage / "train")
        parts = {"tokenizer": self.tokenizer, "text_encoder": text_encoder, "unet": unet, **WITHOUT}
        fields = {**SCHEDULER, "prediction_type": self.config.prediction_type}
        if stage == "first":
            return IFPipeline(scheduler=DDPMScheduler(**fields, sample_max_value=1.5), **parts)
        noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        scheduler = DDPMScheduler(**fields, sample_max_value=1.0)
        return IFSuperResolutionPipeline(scheduler=scheduler, image_noising_scheduler=noising, **parts)

    def denoising(self, stage: str) -> None:
        if not (text := self.root / "text/train/weights.safetensors").exists():
            raise FileNotFoundError(f"{text} does not exist; make it with stage=text")
        config, pipeline = self.config[stage], self.pipeline(stage)
        side = self.config.first.model.sample_size
        crop = config.get("crop"), config.get("crop_share", 0.0)
        objective = HybridDenoising(pipeline, side, config.caption_dropout, *crop)
        self.train(pipeline.unet, objective, Scenes(self.pairs(stage)), stage)

    def first(self) -> None:
        self.denoising("first")

    def second(self) -> None:
        self.denoising("second")

    def export(self) -> None:
        """Whatever is trained so far, as two folders; untrained parts keep their random initialisation."""
        if self.accelerator.is_main_process:
            for stage, folder in FOLDERS.items():
                save_pipeline(self.pipeline(stage), self.root / folder)

    def evaluate(self) -> None:
        """CLIP of the cascade's images, of the first stage's alone, and of real ones; grids of them."""
        if not self.accelerator.is_main_process:
            return
        config, folder = self.config.evaluate, self.root / "evaluation"
        scenes, images = heldout_scenes(config.prompts, config.seed)
        prompts = PromptSet(tuple(caption(scene) for scene in scenes), "heldout")
        side = self.config.first.model.sample_size
        small = F.interpolate(images.float(), (side, side), mode="area").round().to(torch.uint8)
        shown, first = {"real": images, "real, small": small}, load_pipeline(self.root / FOLDERS["first"])
        for guidance in config.guidance:
            shown[f"first, guidance {guidance}"] = sample(Sampler(first, config.steps, guidance, config.seed), prompts)
            before = {"path": str(self.root / FOLDERS["first"]), "steps": config.steps, "guidance_scale": guidance}
            second = load_pipeline(
                self.root / FOLDERS["second"], first_stage={**before, "noise_level": config.noise_level}
            )
            sampler = Sampler(second, config.second_steps, config.second_guidance, config.seed)
            shown[f"cascade, guidance {guidance}"] = sample(sampler, prompts)
        scorer, report = ClipScorer("local-dir:assets/shapes-clip"), {**plain(config), "clip": {}}
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawn in shown.items():
            report["clip"][name] = mean_and_error(scorer.score(drawn, scorer.text(prompts.prompts)))
            save_grid(drawn, folder / f"{name.replace(', ', '_').replace(' ', '_')}.png")
        write_json(folder / "report.json", report)
        print(json.dumps(report, indent=1))
