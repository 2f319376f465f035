"""The networks of a diffusers folder, each with all of its weights: what lacks some is an error, not a random start."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn
from transformers import PreTrainedModel

from slimstep.engine.quiet import one_line, preview
from slimstep.models.folder import final_folder, folder_of, is_pickled, parts_of, variant_of, weight_files
from slimstep.models.vae import NARROW

log = logging.getLogger("slimstep")
EMBEDDED = ".base_layer."  # PEFT's name for what an adapter wraps
DENOISERS = ("unet", "transformer")  # the part of a pipeline that denoises
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def part_of(pipeline: DiffusionPipeline) -> str:
    """What a pipeline calls the network that denoises."""
    return next(part for part in DENOISERS if hasattr(pipeline, part))


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The network of a pipeline that denoises."""
    return getattr(pipeline, part_of(pipeline))


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """{part: network} of those that a pipeline has; none of an unconditional model."""
    return {name: part for name in TEXT_ENCODERS if (part := getattr(pipeline, name, None)) is not None}


def encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """{part: network} of what encodes prompts: text encoders, or, where prompts are images, that of images."""
    image_encoder = getattr(pipeline, "image_encoder", None)
    return text_encoders(pipeline) or ({} if image_encoder is None else {"image_encoder": image_encoder})


def load_networks(
    name_or_path: str | Path, index: Mapping[str, Any], own: type[nn.Module], skipped: Iterable[str] = (), **options
) -> dict:
    """{part: network} of a folder or hub id: what denoises of the class `own`, others of those that its index names.

    index: its model_index.json. skipped: parts to leave out. options: variant, dtype, use_safetensors.
    Raises ValueError as `load_network` does.
    """
    kinds = {part: network_class(*index[part]) for part in parts_of(index) if part not in skipped}
    kinds |= {part: own for part in DENOISERS if part in kinds}
    networks = [part for part, kind in kinds.items() if kind or part == "vae"]  # which may be an export's own
    folder = final_folder(name_or_path)
    if folder and (lacking := [part for part in networks if not (folder / part / "config.json").is_file()]):
        raise ValueError(f"it lacks {lacking[0]}/config.json")  # transformers would take a configuration's defaults
    if "vae" in networks:
        fields = AutoencoderKL.load_config(name_or_path, subfolder="vae")
        if "sample_size" in fields and fields["sample_size"] is None:
            raise ValueError("vae/config.json has sample_size=null, with which diffusers makes none: write its pixels")
        if fields.get("_class_name") in NARROW:
            kinds["vae"] = NARROW[fields["_class_name"]]
    return {part: load_network(name_or_path, part, kinds[part], **options) for part in networks if kinds[part]}


def network_class(library: str, name: str) -> type[nn.Module] | None:
    """The class that an index means by [library, name], where it is a network of diffusers or transformers."""
    modules = {"diffusers": diffusers, "transformers": transformers}
    kind = getattr(modules.get(library) or getattr(diffusers.pipelines, library, None), name, None)
    is_network = isinstance(kind, type) and issubclass(kind, (ModelMixin, PreTrainedModel))
    return kind if is_network and kind is not MultiControlNetModel else None  # several in folders of their own


def load_network(
    name_or_path: str | Path, part: str | None, kind: type[nn.Module], dtype: torch.dtype,
    use_safetensors: bool | None = True, variant: str | None = None,
) -> nn.Module:  # fmt: skip
    """One network of a folder or hub id; part: its folder therein, None for the folder itself.

    Raises ValueError, naming the file, where it cannot be read, or lacks weights that its config.json asks for. Weights
    that this does not ask for are left out with a line of the log.
    """
    folder = folder_of(name_or_path)
    where = Path(part or ".")
    here = folder / where if folder else None
    existing = {variant_of(path.name) for path in weight_files(here)} if here else set()
    if existing and variant not in existing:
        variant = None  # as diffusers takes it for networks that have no files of a variant
    if use_safetensors is None and is_pickled(name_or_path, part or ".", variant):
        use_safetensors = False  # shards of pickles are not looked for otherwise
    names = [path.name for path in weight_files(here) if variant_of(path.name) == variant] if here else []
    file = where / names[0] if len(names) == 1 else where
    options = {"dtype": dtype, "variant": variant, "use_safetensors": use_safetensors, "output_loading_info": True}
    if part:
        options["subfolder"] = part
    if issubclass(kind, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are reported below; transformers reports them in its log alone
    try:
        network, info = kind.from_pretrained(name_or_path, **options)
    except Exception as error:  # torch, pickle and JSON raise whatever a damaged file makes them stumble over
        reason = one_line(error).split(" If you want")[0]
        raise ValueError(f"{file} cannot be read as {where / 'config.json'} describes it: {reason}") from error
    check_complete(network, info, file)
    return network


def check_complete(network: nn.Module, info: Mapping[str, Any], file: Path) -> None:
    """ValueError for a network that is not all in its file. info: what `from_pretrained` says of the loading."""
    # A file may lack what its index promises: then nothing is said to be missing, and stays without memory.
    missing = sorted({*info["missing_keys"], *without_memory(network)})
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        others = f"; it holds {preview(unexpected)} instead" if unexpected else ""
        hint = ", as one that was saved with a LoRA attached: fuse or unload it first" if any(
            EMBEDDED in key for key in unexpected) else ""  # fmt: skip
        raise ValueError(f"{file} lacks {len(missing)} of the weights that config.json asks for, {preview(missing)}"
                         f"{others}{hint}")  # fmt: skip
    if mismatched := sorted(info.get("mismatched_keys") or ()):
        key, stored, expected = mismatched[0]
        raise ValueError(f"{file} does not belong to config.json: {key} is {tuple(stored)}, not {tuple(expected)}, "
                         f"and {len(mismatched) - 1} more")  # fmt: skip
    if unexpected:
        log.warning(f"{file} holds more weights than config.json asks for, {preview(unexpected)}: they are left out")


def without_memory(network: nn.Module) -> list[str]:
    """The weights that no file filled."""
    return [name for name, weight in network.state_dict().items() if weight.is_meta]


# By a pipeline, beside its components and options.
REMEMBERED = ("sequence_length", "block_origins", "trained_steps", "first_stage", "video_options", "first_frames")


def with_unet(pipeline: DiffusionPipeline, unet: nn.Module, **parts) -> DiffusionPipeline:
    """A pipeline of the same class, components and options around another network, and other `parts` where given."""
    _, option_names = pipeline._get_signature_keys(type(pipeline))
    options = {name: pipeline.config[name] for name in option_names if name in pipeline.config}
    made = type(pipeline)(**{**pipeline.components, **options, part_of(pipeline): unet, **parts})
    made.__dict__.update({name: value for name, value in pipeline.__dict__.items() if name in REMEMBERED})
    return made


def with_sequence_length(pipeline: DiffusionPipeline, length: int | None) -> DiffusionPipeline:
    """The same pipeline, which remembers what its call is to be given as max_sequence_length; None: nothing."""
    pipeline.__dict__["sequence_length"] = length
    return pipeline


def sequence_length(pipeline: DiffusionPipeline) -> int | None:
    """The max_sequence_length that a pipeline was loaded with; None for its own default."""
    return pipeline.__dict__.get("sequence_length")


def with_trained_steps(pipeline: DiffusionPipeline, steps: int | None) -> DiffusionPipeline:
    """The same pipeline, which remembers the number of steps that it was distilled to; None: it was not."""
    pipeline.__dict__["trained_steps"] = steps
    return pipeline


def trained_steps_of(pipeline: DiffusionPipeline) -> int | None:
    """The number of steps at whose timesteps alone the network was trained; None for one that learnt all of them."""
    return pipeline.__dict__.get("trained_steps")


def with_block_origins(pipeline: DiffusionPipeline, blocks: Mapping[str, Sequence[str]]) -> DiffusionPipeline:
    """The same pipeline, which remembers where each block of the full model is in its network."""
    pipeline.__dict__["block_origins"] = blocks
    return pipeline


def block_origins(pipeline: DiffusionPipeline) -> Mapping[str, Sequence[str]]:
    """{block of the full model: its paths in the network as it was loaded}; empty where it is the full model."""
    return pipeline.__dict__.get("block_origins", {})


def learnt_places(encoder: nn.Module) -> int | None:
    """The rows of a text encoder's table of positions; None where it rotates them, which has no end."""
    tables = (m for name, m in encoder.named_modules() if name.endswith("position_embedding"))
    return next((table.num_embeddings for table in tables), None)


def forget_last_captions(pipeline: DiffusionPipeline) -> None:
    """Clears the truncation and padding of the tokenizers' last call, which they would write into tokenizer.json: a
    folder is to be the same whether or not a caption went through before. Each call sets both anew."""
    for part in pipeline.components.values():
        tokenizer = getattr(getattr(part, "tokenizer", part), "backend_tokenizer", None)  # a processor's, or itself
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()


def check_tokenizers(pipeline: DiffusionPipeline) -> None:
    """ValueError where a tokenizer gives tokens, or as many of them, as its text encoder has no place for."""
    for part in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, f"{name}{part}", None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        files = f"tokenizer{part}", f"text_encoder{part}/config.json"
        highest, rows = max(tokenizer.get_vocab().values(), default=-1), encoder.get_input_embeddings().num_embeddings
        if highest >= rows:
            word = tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(f"{files[0]}/ gives the token {word!r} the number {highest}, and {files[1]} has "
                             f"vocab_size={rows}: they do not belong together")  # fmt: skip
        places = learnt_places(encoder)
        if places is not None and tokenizer.model_max_length > places:
            longest = f"{files[0]}/tokenizer_config.json has model_max_length={tokenizer.model_max_length}"
            raise ValueError(f"{longest}, and {files[1]} max_position_embeddings={places}: lower the former to that")
