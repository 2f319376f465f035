"""The recipe of the bundled model: its stages, each of which leaves files; what exists is not made again.

Axes: B batch, C channels, H and W pixels or latents, L text tokens, E text width, N scenes, K hard negatives.
"""

import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from scripts.shapes_evaluation import evaluate_assets
from scripts.shapes_models import (
    ScorerWithNames,
    TextEncoderWithNames,
    TextToImage,
    VAEWithPosterior,
    build_pipeline,
    build_scheduler,
    build_vae,
    plain,
    save_pipeline,
    save_scorer,
)
from scripts.shapes_objectives import (
    NUM_CLASSES,
    AutoencoderObjective,
    CaptionReading,
    DenoisingObjective,
    FlowObjective,
    ReadingObjective,
    Scenes,
    ScorerObjective,
    to_unit_range,
)
from scripts.shapes_transformer import TextToImageFlow, build_flow_pipeline, build_flow_scheduler
from scripts.shapes_transformer_evaluation import evaluate_transformer
from slimstep.data.shapes import ShapesPairs, caption
from slimstep.data.shapes_tokenizer import build_tokenizer
from slimstep.engine.checkpoints import EMA_WEIGHTS
from slimstep.engine.config import TrainConfig
from slimstep.engine.files import write_json, write_tensors
from slimstep.engine.loop import train
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.models.noise_schedule import schedule_of


class Recipe:
    """The stages; each leaves files under `root`, and what exists is not made again."""

    def __init__(self, config: DictConfig) -> None:
        self.config, self.root = config, Path(config.root)
        self.accelerator = Accelerator(mixed_precision="no")
        self.tokenizer = build_tokenizer()

    def run(self, stage: str) -> Run:
        return Run(self.root / stage, self.accelerator, seed=self.config.seed)

    def train_config(self, stage: str) -> TrainConfig:
        return TrainConfig(**OmegaConf.to_container(self.config[stage].train, resolve=True))

    @property
    def shipped(self) -> Path:
        """The pipeline folder of the assets."""
        return Path(self.config.assets) / "shapes"

    def vae(self) -> None:
        if "vae" in self.config.shipped:
            return
        config, run = self.config.vae, self.run("vae")
        torch.manual_seed(self.config.seed)
        model = VAEWithPosterior(build_vae(config.model))
        objective = AutoencoderObjective(config.kl_weight, config.crop, config.crop_share)
        scenes = Scenes(ShapesPairs("train", config.scenes, self.config.seed))
        train(model, objective, scenes, self.train_config("vae"), run, "train")
        run.json("vae.json", lambda: self.measured_vae(model.vae))

    @torch.no_grad()
    def measured_vae(self, vae) -> dict[str, float]:
        """Standard deviation of the latents, and the reconstruction's PSNR on held-out scenes."""
        images = ShapesPairs("heldout", 512, seed=1).images(range(512))
        psnrs, latents = [], []
        for batch in to_unit_range(images).to(vae.device).split(64):
            latents.append(vae.encode(batch).latent_dist.mean)
            error_B = ((vae.decode(latents[-1]).sample.clamp(-1, 1) - batch) / 2).square().mean((1, 2, 3))
            psnrs.append(-10 * error_B.log10())
        return {"latent_std": float(torch.cat(latents).std()), "psnr_db": float(torch.cat(psnrs).mean())}

    def trained_vae(self) -> AutoencoderKL:
        """The VAE as far as it is trained, its scaling factor set so that latents have unit variance."""
        if "vae" in self.config.shipped:
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(self.shipped, subfolder="vae"))
            vae.load_state_dict(load_file(self.shipped / "vae" / "diffusion_pytorch_model.safetensors"))
            return vae.eval()  # from_pretrained would keep this folder's name in config.json
        folder = self.root / "vae"
        model = VAEWithPosterior(build_vae(self.config.vae.model))
        load_newest(model, folder / "train")
        if (folder / "vae.json").exists():
            std = json.loads((folder / "vae.json").read_text())["latent_std"]
            model.vae.register_to_config(scaling_factor=round(1 / std, 4))
        return model.vae.eval()

    def scorer_model(self) -> ScorerWithNames:
        torch.manual_seed(self.config.seed)
        return ScorerWithNames(self.config.scorer, self.tokenizer, NUM_CLASSES)

    def scorer(self) -> None:
        if "scorer" in self.config.shipped:
            return
        config = self.config.scorer
        length = config.text_cfg.context_length
        objective = ScorerObjective(self.tokenizer, length, config.negatives, config.naming_weight)
        scenes = Scenes(ShapesPairs("train", config.scenes, self.config.seed + 1), negatives=config.negatives)
        train(self.scorer_model(), objective, scenes, self.train_config("scorer"), self.run("scorer"), "train")

    def latents(self) -> None:
        """Encoded once: float16 latents [N, 4, 16, 16] and token ids [N, L]."""
        config, run, device = self.config.latents, self.run("latents"), self.accelerator.device
        vae = self.trained_vae().to(device, memory_format=torch.channels_last)
        pairs = ShapesPairs("train", config.scenes, self.config.seed)

        @torch.no_grad()
        def encode(indices: list[int]) -> Tensor:
            images = to_unit_range(pairs.images(indices)).to(device, memory_format=torch.channels_last)
            return (vae.encode(images).latent_dist.mean * vae.config.scaling_factor).half()

        if run.made("latents.safetensors"):
            return
        latents_NCHW = map_batches(encode, config.scenes, config.batch_size, self.accelerator, "encoding scenes")
        if self.accelerator.is_main_process:
            captions = [caption(*pairs.scene(index)) for index in range(config.scenes)]
            ids_NL = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            write_tensors(run.path / "latents.safetensors", {"latents": latents_NCHW, "ids": ids_NL.short()})
        self.accelerator.wait_for_everyone()

    def text_to_image(self) -> TextToImage:
        torch.manual_seed(self.config.seed)
        model = TextToImage(self.config.unet, self.tokenizer, self.config.vae.model.latent_channels)
        if "unet" in self.config.shipped:
            model.unet.load_state_dict(load_file(self.shipped / "unet/diffusion_pytorch_model.safetensors"))
            model.text_encoder.load_state_dict(load_file(self.shipped / "text_encoder/model.safetensors"))
        return model

    def text(self) -> None:
        """The text encoder before the UNet: what is where, from captions alone."""
        model = self.text_to_image()
        before = copy.deepcopy(model.text_encoder).requires_grad_(False) if "unet" in self.config.shipped else None
        scenes = CaptionReading(ShapesPairs("train", self.config.text.scenes, self.config.seed), self.tokenizer)
        reader = TextEncoderWithNames(model.text_encoder, NUM_CLASSES)
        train(reader, ReadingObjective(before), scenes, self.train_config("text"), self.run("text"), "train")

    def unet(self) -> None:
        device = self.accelerator.device
        empty_ids_L = self.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0].to(device)
        schedule = schedule_of(build_scheduler(), device)
        config = self.config.unet
        objective = DenoisingObjective(schedule, empty_ids_L, config.caption_dropout, config.timestep_shift)
        latents = CachedScenes(self.root / "latents" / "latents.safetensors")
        model = self.text_to_image()
        load_newest(TextEncoderWithNames(model.text_encoder, NUM_CLASSES), self.root / "text" / "train")
        train(model, objective, latents, self.train_config("unet"), self.run("unet"), "train")

    def export(self) -> None:
        """Whatever is trained so far, as assets; untrained parts keep their random initialisation."""
        if not self.accelerator.is_main_process:
            return
        model = self.text_to_image()
        load_newest(model, self.root / "unet" / "train")
        vae = self.trained_vae()
        save_pipeline(build_pipeline(model, vae, self.tokenizer), self.shipped)
        if "scorer" in self.config.shipped:
            return
        scorer = self.scorer_model()
        load_newest(scorer, self.root / "scorer" / "train")
        save_scorer(scorer.clip, self.config.scorer, self.tokenizer, Path(self.config.assets) / "shapes-clip")

    def evaluate(self) -> None:
        if self.accelerator.is_main_process:
            report = evaluate_assets(Path(self.config.assets), self.config.evaluate, self.root / "evaluation")
            write_json(self.root / "evaluation" / "report.json", report)
            print(json.dumps(report, indent=1))

    def flow_ids(self, captions: list[str]) -> Tensor:
        """Token ids [B, L] as the transformer's pipeline makes them."""
        options = {"padding": "max_length", "max_length": self.config.transformer.max_tokens, "truncation": True}
        return self.tokenizer(captions, return_tensors="pt", **options).input_ids

    def flow_model(self) -> TextToImageFlow:
        """The transformer and its text encoders, of which the first begins as the UNet's."""
        unet_model = self.text_to_image()
        load_newest(unet_model, self.root / "unet" / "train")
        model = TextToImageFlow(self.config.transformer, self.tokenizer, self.config.vae.model.latent_channels)
        pairs = ShapesPairs("train", 256, self.config.seed)
        model.begin_from(unet_model.text_encoder, self.flow_ids([caption(*pairs.scene(n)) for n in range(len(pairs))]))
        return model

    def transformer(self) -> None:
        """At a constant learning rate as long as `train.steps` says, then down to zero in `decay.steps` more."""
        config, run = self.config.transformer, self.run("transformer")
        empty_ids_L = self.flow_ids([""])[0].to(self.accelerator.device)
        schedule = schedule_of(build_flow_scheduler())
        objective = FlowObjective(schedule, empty_ids_L, config.caption_dropout, config.padding, config.padded_share)
        latents = CachedScenes(self.root / "latents" / "latents.safetensors")
        model = self.flow_model()
        if config.compile:
            for block in model.transformer.transformer_blocks:
                block.compile(dynamic=False)
        for stage in ("train", "decay"):
            train(model, objective, latents, TrainConfig(**plain(config[stage])), run, stage)

    def export_transformer(self) -> None:
        """Whatever of it is trained so far, as a pipeline folder of the assets."""
        if not self.accelerator.is_main_process:
            return
        model = self.flow_model()
        for stage in ("train", "decay"):
            load_newest(model, self.root / "transformer" / stage)
        save_pipeline(build_flow_pipeline(model, self.trained_vae()), Path(self.config.assets) / "shapes-dit")

    def evaluate_transformer(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.root / "evaluation-transformer"
            report = evaluate_transformer(Path(self.config.assets), self.config.transformer.evaluate, folder)
            write_json(folder / "report.json", report)
            print(json.dumps(report, indent=1))


def load_newest(model: torch.nn.Module, folder: Path) -> None:
    """The stage's final weights, or the EMA of its newest checkpoint, or nothing where it has not begun."""
    if (folder / "weights.safetensors").exists():
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    elif checkpoints := sorted((folder / "checkpoints").glob("step-*")):
        state = torch.load(checkpoints[-1] / EMA_WEIGHTS, weights_only=True)
        model.load_state_dict(load_file(checkpoints[-1] / "model.safetensors"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter, weight in zip(trained, state["shadow_params"], strict=True):
            parameter.data.copy_(weight)


class CachedScenes(Dataset):
    """Latents and token ids of the encoded scenes, float16 and int16 in memory."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; make it with stage={path.parent.name}")
        tensors = load_file(path)
        self.latents, self.ids = tensors["latents"], tensors["ids"]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        return {"latents": self.latents[indices].float(), "ids": self.ids[indices].long()}
