"""Stable Video Diffusion: a UNet that makes a video of its first frame, in time and space apart, in EDM's steps."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from slimstep.models.autoencoder import stock_vae, vae_obstacles
from slimstep.models.card import origin_of
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.families.exported import Exported, block_map
from slimstep.models.families.stock import public_fields
from slimstep.models.families.svd.conditions import conditions_of_names, nothing
from slimstep.models.families.svd.denoiser import SpatioTemporalDenoiser
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.first_frames import call_options
from slimstep.models.folder import absent_parts, check_index, check_tables, final_folder, stored_dtype
from slimstep.models.networks import load_networks, with_unet
from slimstep.models.sizes import scale_factor, set_resolution, settle_sizes, sides_of

NAME = "Stable Video Diffusion: a StableVideoDiffusionPipeline with a UNetSpatioTemporalConditionModel"
PART = "unet"
NETWORK = PrunableUNetSpatioTemporalConditionModel
IS_CONDITIONAL = False  # on no captions
GUIDES = DRAWS_VIDEOS = True
STATED, OWN = 768, "576x1024"  # pixels that published configurations state, and that their pipeline's call draws
log = logging.getLogger("slimstep")
PARTS = ("unet", "vae", "image_encoder", "feature_extractor", "scheduler")


def matches(index: Mapping[str, Any]) -> bool:
    is_svd = index.get("_class_name") == "StableVideoDiffusionPipeline"
    return is_svd and index["unet"][1] in (NETWORK.__name__, NETWORK.STOCK.__name__)


def owns(network: nn.Module) -> bool:
    return True


# ---- loading and exporting ----


def is_in(names: Collection[str]) -> bool:
    return False  # diffusers reads none


def check_single_file(file: str | Path, config: str | None, allow_pickle: bool) -> None:
    raise ValueError(f"model {str(file)!r} is no single file of Stable Video Diffusion: give its diffusers folder")


def check(name_or_path: str | Path) -> None:
    name = str(name_or_path)
    check_tables(name)
    index = DiffusionPipeline.load_config(name)
    check_index(name, index, PARTS)
    if (folder := final_folder(name)) and (absent := absent_parts(folder, index)):
        raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")
    fields = UNetSpatioTemporalConditionModel.load_config(name, subfolder="unet")
    taken, given = fields.get("in_channels", 8), fields.get("out_channels", 4)
    if taken != 2 * given:
        channels = f"in_channels={taken} and out_channels={given}"
        raise ValueError(f"model {name!r} has a UNet with {channels}; it must take twice as many as it gives, those of "
                         "the first frame beside each frame's own")  # fmt: skip


def read(
    name_or_path: str | Path,
    dtype: torch.dtype | None,
    variant: str | None,
    allow_pickle: bool,
    single_file_config: str | None,
    vae: str | None,
) -> DiffusionPipeline:
    if vae:
        raise ValueError(f"model.vae={vae} takes the place of an AutoencoderKL alone; the decoder of this model sees "
                         "several frames at once")  # fmt: skip
    index = DiffusionPipeline.load_config(name_or_path)
    options = {"variant": variant, "dtype": dtype or stored_dtype(name_or_path, variant)}
    options["use_safetensors"] = None if allow_pickle else True
    own = load_networks(name_or_path, index, NETWORK, **options)
    # Without these first: diffusers would look for the class file of an export of ours, and ask for trust.
    rest = DiffusionPipeline.from_pretrained(name_or_path, **dict.fromkeys(own), **options)
    pipeline = with_unet(rest, **own)
    settle_sizes(pipeline)
    if origin_of(name_or_path) is None:  # students say what they draw
        draw_as_the_call(pipeline)
    return pipeline


def draw_as_the_call(pipeline: DiffusionPipeline) -> None:
    """Makes what the pipeline's call draws by default the size of a published model, whose configuration states another
    one."""
    if sides_of(pipeline.unet.config) == (STATED // scale_factor(pipeline),) * 2:
        set_resolution(pipeline, OWN)
        log.info(f"unet/config.json states {STATED}x{STATED} px, and the call of its pipeline draws {OWN}, the default "
                 "here, too")  # fmt: skip


def exported(pipeline: DiffusionPipeline) -> Exported:
    """Of diffusers' own class where nothing is changed; else the class travels along, for a configuration of the own
    one has no place for a layer without its temporal half."""
    unet, vae = pipeline.unet, stock_vae(pipeline.vae)
    changed = tuple(getattr(unet, "architecture", {}))
    obstacles = tuple(f"{block} (is changed, which no stock UNet of this kind can be)" for block in changed)
    made = unet if changed else stock_unet(unet)
    return Exported(with_unet(pipeline, made, vae=vae), (*obstacles, *vae_obstacles(vae)), block_map(unet, {}))


def stock_unet(unet: UNetSpatioTemporalConditionModel) -> UNetSpatioTemporalConditionModel:
    """A whole network in diffusers' own class, with the same weights."""
    stock = NETWORK.STOCK.from_config(public_fields(unet)).to(unet.device, unet.dtype)
    stock.load_state_dict(unet.state_dict())
    return stock.eval()


# ---- conditioning, latents ----


def denoiser(network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
    return SpatioTemporalDenoiser(prediction_type, sample_shape)


def encode(pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None) -> Conditioning:
    """prompts: names of first frames that the pipeline remembers."""
    return conditions_of_names(pipeline, prompts)


def unconditional(pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
    return nothing(pipeline)


def tokens(pipeline: DiffusionPipeline) -> int:
    return 1


def call(pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
    height, width = (side * scale_factor(pipeline) for side in sides_of(pipeline.unet.config))
    shape = {"num_frames": frames(pipeline.unet), "height": height, "width": width}
    latents = {} if noise is None else {"latents": noise.transpose(1, 2)}
    return {"max_guidance_scale": guidance_scale, **shape, **call_options(pipeline), **latents}


def channels(network: nn.Module) -> int:
    """Of what is denoised; the network is given the first frame's beside them."""
    return network.config.out_channels


def frames(network: nn.Module) -> int:
    return network.config.num_frames


def draws_rectangles(pipeline: DiffusionPipeline) -> bool:
    return True


def shrinks(network: nn.Module) -> int:
    return 2 ** (len(network.config.block_out_channels) - 1)


def flow(config: Mapping[str, Any]) -> None:
    return None


def codec(pipeline: DiffusionPipeline) -> ModelMixin:
    return pipeline.vae
