"""Loading a teacher pipeline around a prunable UNet, and handing a student over as an ordinary diffusers folder."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging import CRITICAL
from pathlib import Path
from types import ModuleType

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

import models.unet
import models.vae
from data.files import whole_folder, write_json
from models.single_file import check_single_file, is_single_file, load_single_file, usual_config
from models.stock import stock_config, to_stock
from models.unet import PrunableUNet2DConditionModel
from models.vae import NarrowAutoencoderKL

LOADABLE_UNETS = (UNet2DConditionModel.__name__, PrunableUNet2DConditionModel.__name__)


@dataclass(frozen=True)
class ExportVerdict:
    """What kind of folder an export is.

    is_stock: UNet and VAE are diffusers' own classes. obstacles: why not, by site. load: the Python that loads it.
    """

    is_stock: bool
    obstacles: tuple[str, ...]
    load: str


def load_pipeline(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    allow_download: bool = True,
    allow_pickle: bool = False,
    single_file_config: str | None = None,
) -> DiffusionPipeline:
    """A Stable Diffusion pipeline (any with a UNet2DConditionModel) whose `unet` is prunable, in eval mode on the CPU.

    name_or_path: a diffusers folder, exports of ours included, a hub id, or a single file in the original layout, whose
    configuration and tokenizer are those of `single_file_config` (a diffusers folder or hub id; None for the one that
    diffusers infers from the weights). HF_HUB_OFFLINE is obeyed. variant: the weight files' infix ('fp16').
    allow_pickle: read .bin and .ckpt files too, which may run code. Raises ValueError where it is none of these, or has
    no such UNet.
    """
    where = {"variant": variant, "local_files_only": not allow_download}
    options = {**where, "use_safetensors": None if allow_pickle else True, "dtype": dtype}
    with quiet():
        check_pipeline(name_or_path, where, single_file_config, allow_pickle)
        try:
            if is_single_file(name_or_path):
                config = single_file_config or usual_config(name_or_path)
                rest = load_single_file(name_or_path, config, dtype, not allow_download)
                own = {"unet": PrunableUNet2DConditionModel.from_unet(rest.unet)}
            else:
                unet = load_unet(name_or_path, **options)
                own = {"unet": unet, **load_narrow_vae(name_or_path, where, **options)}
                # Without these first: diffusers would look for the class files of an export of ours, and ask for trust.
                rest = DiffusionPipeline.from_pretrained(name_or_path, **dict.fromkeys(own), **options)
        except Exception as error:  # tokenizers raises nothing more special for a damaged file
            raise ValueError(f"model {str(name_or_path)!r} is incomplete or damaged: {one_line(error)}") from error
        pipeline = with_unet(rest, **own)
    for module in networks(pipeline):
        module.eval()
        own_memory(module)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> ExportVerdict:
    """Write a diffusers folder, aside and then renamed; an old one in its place is replaced.

    Where the architectures are ones that diffusers' own classes can express, the folder holds those and loads
    everywhere. Otherwise the class file of the UNet or VAE travels in it, under a name that is a hash of its content
    (diffusers keys imported files by name alone). verdict.json holds what is returned. ValueError where the folder
    holds anything but a pipeline.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"export folder {str(folder)!r} holds something else than a pipeline; name a new one")
    verdict, vae = stock_config(pipeline.unet), stock_vae(pipeline.vae)
    unet = pipeline.unet if verdict.config is None else to_stock(pipeline.unet)
    travelling = {"unet": models.unet} if verdict.config is None else {}
    obstacles = verdict.obstacles
    if isinstance(vae, NarrowAutoencoderKL):
        travelling["vae"] = models.vae
        obstacles += (f"vae.decoder: its widths {vae.decoder_widths} are not its encoder's",)
    flag = ", trust_remote_code=True" if travelling else ""
    export = ExportVerdict(not travelling, obstacles, f'DiffusionPipeline.from_pretrained("{folder}"{flag})')
    with whole_folder(folder) as aside, quiet():
        with_unet(pipeline, unet, vae=vae).save_pretrained(aside)
        for part, module in travelling.items():
            add_class_file(aside, part, module)
        write_json(aside / "verdict.json", asdict(export))
        make_readable(aside)
    return export


def add_class_file(folder: Path, part: str, module: ModuleType) -> None:
    """Make a saved pipeline carry the class of its `part`, so that diffusers loads it without this project."""
    source, index = Path(module.__file__), folder / "model_index.json"
    name = f"slimstep_{part}_{hashlib.sha256(source.read_bytes()).hexdigest()[:10]}"
    shutil.copyfile(source, folder / part / f"{name}.py")
    fields = json.loads(index.read_text())
    class_name = fields[part][1]
    index.write_text(json.dumps({**fields, part: [name, class_name]}, indent=2) + "\n")
    if part == "vae":  # AutoModel loads the part alone; the UNet's class would not know the field
        config = folder / part / "config.json"
        fields = json.loads(config.read_text()) | {"auto_map": {"AutoModel": f"{name}.{class_name}"}}
        config.write_text(json.dumps(fields, indent=2) + "\n")


def stock_vae(vae: nn.Module) -> nn.Module:
    """Diffusers' own class where the decoder has the encoder's widths; any other VAE as it is."""
    if not isinstance(vae, NarrowAutoencoderKL) or vae.is_narrow:
        return vae
    own = ("decoder_block_out_channels", "decoder_norm_groups", "auto_map")
    stock = AutoencoderKL.from_config({k: v for k, v in vae.config.items() if k not in own})
    stock.load_state_dict(vae.state_dict())
    return stock.to(vae.device, vae.dtype).eval()


def check_pipeline(
    name_or_path: str | Path, where: dict, single_file_config: str | None = None, allow_pickle: bool = False
) -> None:
    """ValueError unless this is a pipeline with a UNet that can be pruned, and, if a folder, has all its parts."""
    if is_single_file(name_or_path):
        check_single_file(name_or_path, allow_pickle)
        try:
            return check_pipeline(single_file_config or usual_config(name_or_path), where)
        except (ValueError, OSError) as error:
            way = "model.single_file_config=FOLDER gives it a diffusers folder's configuration and tokenizer"
            raise ValueError(f"model {str(name_or_path)!r} is a single file; {way} ({one_line(error)})") from error
    name, local_only = str(name_or_path), where["local_files_only"]
    try:
        index = DiffusionPipeline.load_config(name, local_files_only=local_only)
        fields = UNet2DConditionModel.load_config(name, subfolder="unet", local_files_only=local_only)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"model {name!r} is no UNet pipeline saved by diffusers: {one_line(error)}") from error
        offline = huggingface_hub.constants.HF_HUB_OFFLINE or local_only
        way = "download it once without HF_HUB_OFFLINE=1" if offline else "check the name and the network"
        raise ValueError(f"model {name!r} is no folder, and not in the hub cache: {way}, or give a folder") from error
    if fields.get("_class_name") not in LOADABLE_UNETS:
        found = fields.get("_class_name")
        raise ValueError(f"model {name!r} has the UNet class {found}; pruning needs one of {LOADABLE_UNETS}")
    # transformers makes up an empty tokenizer where the folder is missing.
    parts = [part for part, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]
    if Path(name).is_dir() and (absent := [part for part in parts if not (Path(name) / part).is_dir()]):
        raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")


def load_unet(name_or_path: str | Path, **options) -> PrunableUNet2DConditionModel:
    """The `unet` of a diffusers folder or hub id; ValueError where config and weights do not belong together."""
    load = PrunableUNet2DConditionModel.from_pretrained
    misfit = f"model {str(name_or_path)!r}: unet/config.json does not belong to the weights"
    try:
        unet, info = load(name_or_path, subfolder="unet", output_loading_info=True, **options)
    except ValueError as error:
        raise ValueError(f"{misfit}: {one_line(error).split(' If you want')[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{misfit}: {len(missing)} that it asks for are absent ({', '.join(missing[:3])} …)")
    return unet


def load_narrow_vae(name_or_path: str | Path, where: dict, **options) -> dict[str, NarrowAutoencoderKL]:
    """{"vae": …} where a pipeline's decoder is a narrow one; nothing where the VAE is diffusers' own."""
    of_pipeline = {"subfolder": "vae", "local_files_only": where["local_files_only"]}
    fields = AutoencoderKL.load_config(name_or_path, **of_pipeline)
    if fields.get("_class_name") != NarrowAutoencoderKL.__name__:
        return {}
    vae, info = NarrowAutoencoderKL.from_pretrained(name_or_path, subfolder="vae", output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"vae/config.json does not belong to the weights: {missing[0]} … are absent")
    return {"vae": vae}


def with_unet(pipeline: DiffusionPipeline, unet: UNet2DConditionModel, **parts) -> DiffusionPipeline:
    """A pipeline of the same class, components and options around another UNet, and other `parts` where given."""
    _, option_names = pipeline._get_signature_keys(type(pipeline))
    options = {name: pipeline.config[name] for name in option_names if name in pipeline.config}
    return type(pipeline)(**{**pipeline.components, **options, "unet": unet, **parts})


def networks(pipeline: DiffusionPipeline) -> Iterator[nn.Module]:
    return (part for part in pipeline.components.values() if isinstance(part, nn.Module))


def own_memory(module: nn.Module) -> None:
    """Move weights out of the memory-mapped file: its alignment picks other kernels, which round differently."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def on_device(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The module on this device while the block runs; afterwards it is where it was."""
    before = next(module.parameters()).device
    try:
        yield module.to(device)
    finally:
        module.to(before)


def make_readable(folder: Path) -> None:
    """Weight files are written 0600; a hand-over is for others."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from diffusers and transformers."""
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    for logging in loggings:
        logging.set_verbosity(CRITICAL)  # what goes wrong is raised
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, (verbosity, has_bars) in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()
