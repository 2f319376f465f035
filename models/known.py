"""Known pipelines without their weights, as diffusers folders: what a single file in the original layout lacks.

Nothing is fetched: CLIP's vocabulary is built from the table of merges that open_clip_torch brings along.
"""

import gzip
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTextConfig, CLIPTokenizer

import slimstep.models.reference as reference
from slimstep.engine.files import write_json
from slimstep.engine.quiet import quiet
from slimstep.engine.seeding import seed_of
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.schedulers import swapped_scheduler

TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
CLIP_TOKENS, NUM_MERGES = 77, 49152 - 256 - 2


@dataclass(frozen=True)
class Known:
    """A kind of pipeline. hub: the id whose configuration diffusers takes for this kind, if there is one.

    networks: keys of its UNet and VAE in models.reference. texts: names of its text configurations there. pads: the
    padding token of each tokenizer, None for the end token. pixels: the side of its images.
    """

    hub: str | None
    pipeline: str
    networks: tuple[str, str]
    texts: tuple[str, ...]
    pads: tuple[str | None, ...]
    scheduler: str
    pixels: int
    prediction_type: str = "epsilon"
    upcast_attention: bool = False


SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
KNOWN = {
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5", SD, ("sd15", "sd15"), ("CLIP_L",), (None,),
                  "PNDMScheduler", 512),
    "sd21": Known("stabilityai/stable-diffusion-2-1", SD, ("sd21", "sd15"), ("VIT_H",), ("!",), "DDIMScheduler", 768,
                  "v_prediction", upcast_attention=True),
    "sd21_base": Known(None, SD, ("sd21", "sd15"), ("VIT_H",), ("!",), "PNDMScheduler", 512),
    "sdxl": Known("stabilityai/stable-diffusion-xl-base-1.0", SDXL, ("sdxl", "sdxl"), ("CLIP_L", "BIG_G"), (None, "!"),
                  "EulerDiscreteScheduler", 1024),
}  # fmt: skip


def known_by(hub: str) -> str | None:
    """The name of the kind for which diffusers takes the configuration of this hub id; None for one not known here."""
    return next((name for name, kind in KNOWN.items() if kind.hub == hub), None)


def write_configuration(name: str, folder: Path) -> None:
    """A diffusers folder without weights. ValueError for an unknown name."""
    if name not in KNOWN:
        raise ValueError(f"no pipeline is known as {name!r}; choose from {list(KNOWN)}")
    kind, index = KNOWN[name], {}
    unet, vae = reference.CONFIGS[kind.networks[0]], reference.VAE_CONFIGS[kind.networks[1]]
    shrinks = 2 ** (len(vae["block_out_channels"]) - 1)
    unet_fields = {"sample_size": kind.pixels // shrinks, "upcast_attention": kind.upcast_attention}
    networks = {
        "unet": ("UNet2DConditionModel", {**unet, **unet_fields}),
        "vae": ("AutoencoderKL", {**vae, "sample_size": kind.pixels}),
        "scheduler": (kind.scheduler, scheduler_config(kind)),
    }
    for part, (class_name, fields) in networks.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(folder / part / file, {"_class_name": class_name, **fields})
        index[part] = ["diffusers", class_name]
    for (part, class_name), text, pad in zip(TEXT_ENCODERS.items(), kind.texts, kind.pads, strict=False):
        tokenizer = part.replace("text_encoder", "tokenizer")
        CLIPTextConfig(**getattr(reference, text)).save_pretrained(folder / part)
        clip_tokenizer(pad).save_pretrained(folder / tokenizer)
        index |= {part: ["transformers", class_name], tokenizer: ["transformers", "CLIPTokenizer"]}
    options = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    if kind.pipeline == SD:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        options = {"requires_safety_checker": False}
    write_json(folder / "model_index.json", {"_class_name": kind.pipeline, **index, **options})


def random_pipeline(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> DiffusionPipeline:
    """A whole pipeline of a known kind with random weights and DDIM, made in `dtype`: its speed, and nothing else.

    Raises ValueError for an unknown name.
    """
    before = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(name, Path(folder))
        torch.manual_seed(seed_of("random pipeline", seed))
        torch.set_default_dtype(dtype)
        try:
            networks = {
                part: kind.from_config(kind.load_config(folder, subfolder=part)).eval()
                for part, kind in {"unet": PrunableUNet2DConditionModel, "vae": AutoencoderKL}.items()
            }
            for (part, class_name), _ in zip(TEXT_ENCODERS.items(), KNOWN[name].texts, strict=False):
                config = CLIPTextConfig.from_pretrained(folder, subfolder=part)
                networks[part] = getattr(transformers, class_name)(config).eval()
        finally:
            torch.set_default_dtype(before)
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(folder, **networks)
    pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, "ddim"))
    return pipeline


def scheduler_config(kind: Known) -> dict:
    kind_fields = {"skip_prk_steps": True} if kind.scheduler == "PNDMScheduler" else {}
    spacing = {"timestep_spacing": "leading"}
    fields = {**reference.SCHEDULER, **spacing, **kind_fields, "prediction_type": kind.prediction_type}
    taken = getattr(diffusers, kind.scheduler)._get_init_keys(getattr(diffusers, kind.scheduler))
    return {key: value for key, value in fields.items() if key in taken}


def clip_tokenizer(pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer of 49408 tokens and 77 places, padded with its end token or with `pad_token`."""
    vocabulary, merges = clip_vocabulary()
    padding = {} if pad_token is None else {"pad_token": pad_token}
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=CLIP_TOKENS, **padding)


@cache
def clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """{token: id} and the merges: 256 bytes, within a word and at its end, one token per merge, start and end."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = tuple(tuple(line.split()) for line in lines[1 : NUM_MERGES + 1])
    symbols = list(bytes_to_unicode().values())
    ends = [f"{symbol}</w>" for symbol in symbols]
    tokens = [*symbols, *ends, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges
