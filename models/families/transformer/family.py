"""What families of transformers share: loading, exporting and encoding by diffusers' own pipelines.

A family of `models/family.py` is a `TransformerFamily`, described in a small file of its own (sd3.py).
"""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from slimstep.models.autoencoder import load_vae, stock_vae, vae_obstacles
from slimstep.models.checkpoint import check_file, is_single_file
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import has_statistics
from slimstep.models.denoiser import Denoiser
from slimstep.models.families.exported import Exported, block_map
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.network import PrunableTransformer
from slimstep.models.families.transformer.single_file import holds, transformer_in
from slimstep.models.families.transformer.stock import obstacles_of, stock_paths, to_stock
from slimstep.models.flow import FlowSteps
from slimstep.models.folder import absent_parts, check_index, check_tables, final_folder, stored_dtype
from slimstep.models.networks import (
    check_tokenizers,
    load_networks,
    network_of,
    sequence_length,
    text_encoders,
    with_unet,
)
from slimstep.models.sizes import native_frames, scale_factor, settle_sizes, sides_of

Encode = Callable[[DiffusionPipeline, Sequence[str], torch.device, bool, int], Conditioning]


@dataclass(frozen=True)
class TransformerFamily:
    """A transformer of diffusers in pipelines of its own.

    PIPELINES: names of their classes. DENOISER: the class of how the network is called. encoded: the conditioning of
    prompts by encoders on a device, or, where the next argument is true, what guidance steers away from, one row; the
    last argument is the pipeline's max_sequence_length. max_tokens: its default, of each of PIPELINES or of all.
    more_tokens: those of a prompt beside these. packing: the latents along a side that the pipeline makes one token of;
    1 where the network has patches of its own.
    own_sigmas: whether the pipeline gives its scheduler its σ; is_flow: whether it is made for flow matching at all.
    latent_frames: of what a network of this configuration makes, where that is videos.
    as_tokens: latents as the pipeline's call takes them. own_options: what the call is also given, at this guidance
    scale.
    refused: fields of config.json, or of model_index.json, that make other networks of the class.
    single_file: names of weights that are all in a single file of this transformer and of no other, for each layout.
    """

    NAME: str
    NETWORK: type[PrunableTransformer]
    PIPELINES: tuple[str, ...]
    DENOISER: type[TransformerDenoiser]
    encoded: Encode
    max_tokens: int | Mapping[str, int]
    more_tokens: Callable[[DiffusionPipeline], int] = lambda pipeline: 0
    packing: int = 1
    own_sigmas: bool = False
    is_flow: bool = True
    refused: tuple[str, ...] = ()
    single_file: tuple[tuple[str, ...], ...] = ()
    latent_frames: Callable[[Mapping[str, Any]], int] | None = None
    as_tokens: Callable[[Tensor], Tensor] = lambda latents: latents
    own_options: Callable[[float], dict[str, Any]] = lambda guidance_scale: {}
    PART: str = "transformer"
    IS_CONDITIONAL: bool = True
    GUIDES: bool = True

    @property
    def DRAWS_VIDEOS(self) -> bool:
        return self.latent_frames is not None

    def matches(self, index: Mapping[str, Any]) -> bool:
        names = (self.NETWORK.__name__, self.NETWORK.STOCK.__name__)
        return index.get("_class_name") in self.PIPELINES and index[self.PART][1] in names

    def owns(self, network: nn.Module) -> bool:
        return True

    # ---- loading and exporting ----

    def is_in(self, names: Collection[str]) -> bool:
        return holds(names, self.single_file)

    def check_single_file(self, file: str | Path, config: str | None, allow_pickle: bool) -> None:
        check_file(file, allow_pickle)
        kind = self.NETWORK.STOCK.__name__
        if kind not in SINGLE_FILE_LOADABLE_CLASSES:
            raise ValueError(f"model {str(file)!r} is a single file of a {kind}, which diffusers does not read: "
                             "give its diffusers folder")  # fmt: skip
        if not config:
            way = "model.single_file_config=FOLDER_OR_HUB_ID names the diffusers model"
            raise ValueError(f"model {str(file)!r} holds a {kind}: {way} that its other parts are of")
        self.check(config)
        if not self.matches(index := DiffusionPipeline.load_config(config)):
            raise ValueError(f"model {str(file)!r} holds a {kind}, and model.single_file_config={config} is a "
                             f"{index['_class_name']} with another network")  # fmt: skip

    def check(self, name_or_path: str | Path) -> None:
        name = str(name_or_path)
        check_tables(name)
        index = DiffusionPipeline.load_config(name)
        check_index(name, index, (self.PART, "vae", "scheduler"))
        if (folder := final_folder(name)) and (absent := absent_parts(folder, index)):
            raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")
        fields = self.NETWORK.STOCK.load_config(name, subfolder=self.PART) if self.refused else {}
        for file, values in {"model_index.json": index, f"{self.PART}/config.json": fields}.items():
            if differing := [field for field in self.refused if values.get(field)]:
                which = f"{file} has {differing[0]}={json.dumps(values[differing[0]])}"
                raise ValueError(f"model {name!r}: its {which}, a network of another kind; supported is {self.NAME}, "
                                 "without it")  # fmt: skip

    def read(
        self,
        name_or_path: str | Path,
        dtype: torch.dtype | None,
        variant: str | None,
        allow_pickle: bool,
        single_file_config: str | None,
        vae: str | None,
    ) -> DiffusionPipeline:
        own, file = {}, name_or_path
        if is_single_file(file):
            assert single_file_config, "check_single_file has seen to it"
            name_or_path = single_file_config
            own[self.PART] = transformer_in(file, self.NETWORK, name_or_path, self.PART, dtype)
            dtype = own[self.PART].dtype
        dtype = dtype or stored_dtype(name_or_path, variant, self.PART)
        options = {"variant": variant, "dtype": dtype, "use_safetensors": None if allow_pickle else True}
        index = DiffusionPipeline.load_config(name_or_path)
        own |= load_networks(name_or_path, index, self.NETWORK, [*own, *(["vae"] if vae else [])], **options)
        if vae:
            fields = AutoencoderKL.load_config(name_or_path, subfolder="vae")
            own["vae"] = load_vae(vae, fields, dtype, allow_pickle)
        # diffusers has to be given the parts that a model_index.json says are not there, as T5 of a small SD3.
        absent = (part for part, value in index.items() if isinstance(value, (list, tuple)) and value[:1] == [None])
        kind = getattr(diffusers, index["_class_name"])  # DiffusionPipeline would load a part that Wan's may lack
        rest = kind.from_pretrained(name_or_path, **dict.fromkeys([*own, *absent]), **options)
        pipeline = with_unet(rest, own.pop(self.PART), **own)
        settle_sizes(pipeline)
        check_tokenizers(pipeline)
        has_statistics(pipeline)  # ValueError for damaged ones
        return pipeline

    def exported(self, pipeline: DiffusionPipeline) -> Exported:
        network, vae = network_of(pipeline), stock_vae(pipeline.vae)
        obstacles = obstacles_of(network)
        if obstacles:
            removed = (block for block in network.parents if not network.repeats(block))
            gone = {path: [] for block in removed for path in network.parts_of(block)}
            made, blocks = travelling(network), block_map(network, {}) | gone
        else:
            paths = stock_paths(network) if isinstance(network, PrunableTransformer) else {}
            made, blocks = to_stock(network), block_map(network, paths)
        return Exported(with_unet(pipeline, made, vae=vae), (*obstacles, *vae_obstacles(vae)), blocks)

    # ---- conditioning, latents ----

    def denoiser(self, network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
        return self.DENOISER(prediction_type, sample_shape)

    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None
    ) -> Conditioning:
        device = device or encoder_device(pipeline)
        return self.encoded(pipeline, list(prompts), device, False, self.sequence_length(pipeline))

    def unconditional(self, pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
        device = device or encoder_device(pipeline)
        return self.encoded(pipeline, [""], device, True, self.sequence_length(pipeline))

    def tokens(self, pipeline: DiffusionPipeline) -> int:
        return self.more_tokens(pipeline) + self.sequence_length(pipeline)

    def sequence_length(self, pipeline: DiffusionPipeline) -> int:
        """max_sequence_length of the pipeline's call: what it was loaded with, else the default of its class."""
        default = self.max_tokens if isinstance(self.max_tokens, int) else self.max_tokens[type(pipeline).__name__]
        return sequence_length(pipeline) or default

    def call(self, pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
        length = sequence_length(pipeline)
        network: Any = network_of(pipeline)
        height, width = (side * scale_factor(pipeline) for side in sides_of(network.config))
        options = {"guidance_scale": guidance_scale, "height": height, "width": width}
        options |= self.own_options(guidance_scale)
        options |= {"num_frames": frames} if (frames := native_frames(pipeline)) else {}
        options |= {"max_sequence_length": length} if length else {}
        return options | ({} if noise is None else {"latents": self.as_tokens(noise)})

    def channels(self, network: nn.Module) -> int:
        return network.config.in_channels // self.packing**2

    def frames(self, network: nn.Module) -> int | None:
        return self.latent_frames(network.config) if self.latent_frames else None

    def draws_rectangles(self, pipeline: DiffusionPipeline) -> bool:
        return self.DRAWS_VIDEOS  # those of images have the side of a square in their configurations

    def shrinks(self, network: nn.Module) -> int:
        return self.patch(network.config)

    def patch(self, config: Mapping[str, Any]) -> int:
        """The latents along a side of what becomes one token."""
        size = config["patch_size"] if self.packing == 1 else self.packing
        return size if isinstance(size, int) else size[-1]  # of videos along the time, too

    def flow(self, config: Mapping[str, Any]) -> FlowSteps | None:
        if not self.is_flow:
            return None
        height, width = ((side or 0) // self.patch(config) for side in sides_of(config))
        return FlowSteps(tokens=height * width, own_sigmas=self.own_sigmas)

    def codec(self, pipeline: DiffusionPipeline) -> ModelMixin:
        return pipeline.vae


def travelling(network: PrunableTransformer) -> PrunableTransformer:
    """A copy whose configuration says the size that its positions were made for, which diffusers makes anew."""
    copied = copy.deepcopy(network)
    copied.register_to_config(**network.size_fields())
    return copied


def encoder_device(pipeline: DiffusionPipeline) -> torch.device:
    return next(iter(text_encoders(pipeline).values())).device
