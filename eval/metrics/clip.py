"""CLIP score through open_clip: how well an image shows its prompt, in any of open_clip's models.

"CLIP score" is many metrics: model, weights, prompt prefix, preprocessing and scale change it, so `ClipScorer.protocol`
goes into every record. CLIP score alone can rise while images get worse (guidance does that), so the distance to
reference images at equal seed is measured beside it.

Axes: B images, N prompts, D feature width, H and W pixels.
"""

import difflib
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from open_clip.utils import to_2tuple
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from slimstep.engine.files import digest
from slimstep.engine.quiet import one_line

LOCAL, HUB = "local-dir:", "hf-hub:"
Rows = TypeVar("Rows", list[str], Tensor)
CONFIG_FILE, GELU = "open_clip_config.json", "quick_gelu"
NORMALISATIONS = {
    "openai": (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "inception": (INCEPTION_MEAN, INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}  # mean and standard deviation that images in [0, 1] lose, by channel
BATCH = 64  # images or prompts per forward pass
WITHOUT_SCORER = "scorer=none, and images are scored for their prompts: scorer=openclip takes any CLIP"
# Rounding to 8 bits makes an error of 1/12 squared grey levels: no two 8-bit images are known to be closer than that.
CLOSEST_MSE = 1 / 12
PSNR_ROWS = 64


def psnr(images_B3HW: Tensor, reference_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images, float32 [B]; equal images have 58.9 dB, as 8-bit rounding."""
    # Part by part: floats of thousands of images fill a machine.
    pairs = zip(images_B3HW.split(PSNR_ROWS), reference_B3HW.split(PSNR_ROWS), strict=True)
    errors = [(one.float() - other.float()).square().flatten(1).mean(1) for one, other in pairs]
    return 10 * torch.log10(255**2 / torch.cat(errors).clamp(min=CLOSEST_MSE))


class ClipScorer:
    """Scores images against prompts: `scale` times the cosine of their features, which are normalised.

    `model` and `pretrained` are open_clip's: a name and a tag ("ViT-g-14", "laion2b_s34b_b88k") or a checkpoint file,
    or `model` alone as "local-dir:FOLDER" or "hf-hub:ORG/NAME". `scale` 100 is the usual unit, 1 the raw cosine.
    A checkpoint file does not say which activation (`quick_gelu`) and which `normalisation` ("openai", "imagenet",
    "inception" or "none") it was trained with: both are asked for where the tags of `model` differ in them.
    `allow_pickle` reads local checkpoints that are no safetensors. With `force` a job goes on whose data the scorer
    cannot evaluate (eval/scorer_check.py).
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        prefix: str = "",
        scale: float = 100.0,
        quick_gelu: bool | None = None,
        normalisation: str | None = None,
        allow_pickle: bool = False,
        force: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        """Raises ValueError for a model, tag or folder that open_clip does not know or cannot load, and for a file
        whose activation or normalisation is not known.
        """
        check_names(model, pretrained)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scorer.scale={scale} must be above 0")
        if not allow_pickle:
            check_safe(model, pretrained)
        self.model_name, self.pretrained, self.prefix, self.scale = model, pretrained, prefix, scale
        self.force, self.device = force, torch.device(device)
        self.latest: list[tuple[weakref.ref, Tensor]] = []  # images as last seen, and their features
        options = {"device": self.device, "require_pretrained": True}
        options |= trained_with(model, pretrained, quick_gelu, normalisation)
        with quiet_root_logger():
            try:
                self.model = open_clip.create_model(model, pretrained, **options)
                self.tokenizer = open_clip.get_tokenizer(model)
            except Exception as error:  # readers of damaged files raise whatever they stumble over
                raise ValueError(explain(model, pretrained, error)) from error
        check_tokens(self.model, self.tokenizer, model)
        self.model.eval().requires_grad_(False)
        self.preprocessing = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.check_given(quick_gelu, normalisation)
        self.transform = image_transform_v2(self.preprocessing, is_train=False)

    @property
    def has_quick_gelu(self) -> bool:
        return any(isinstance(layer, QuickGELU) for layer in self.model.modules())

    def check_given(self, quick_gelu: bool | None, normalisation: str | None) -> None:
        """ValueError for arguments that contradict what a tag or a folder says of its own training."""
        statistics = tuple(self.preprocessing.mean), tuple(self.preprocessing.std)
        wrong = {
            GELU: quick_gelu not in (None, self.has_quick_gelu),
            "normalisation": normalisation is not None and NORMALISATIONS[normalisation] != statistics,
        }
        requested = {GELU: quick_gelu, "normalisation": normalisation}
        if said := [f"scorer.{name}={requested[name]}" for name, is_wrong in wrong.items() if is_wrong]:
            where = self.pretrained or self.model_name
            raise ValueError(f"{', '.join(said)} (or a preference's own): {where} says otherwise, and needs neither")

    @cached_property
    def protocol(self) -> dict:
        """All that makes this CLIP score this metric; `weights` hashes a local checkpoint, wherever it lies.

        The activation is listed where it differs from the one in the model's own configuration.
        """
        cfg = self.preprocessing
        is_folder, quick = self.model_name.startswith(LOCAL), self.has_quick_gelu
        is_usual = self.model_name.startswith((LOCAL, HUB)) or quick == is_quick(self.model_name, None)
        return {
            "model": LOCAL + Path(self.model_name.removeprefix(LOCAL)).name if is_folder else self.model_name,
            "pretrained": self.pretrained and Path(self.pretrained).name,
            "weights": local_weights_hash(self.model_name, self.pretrained),
            "prefix": self.prefix,
            "resize": {"size": list(to_2tuple(cfg.size)), "mode": cfg.resize_mode, "interpolation": cfg.interpolation},
            "scale": self.scale,
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            **({} if is_usual else {GELU: quick}),
        }

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [N, D] of the prompts, with the prefix before each."""
        tokens = [self.tokenizer([self.prefix + prompt for prompt in batch]) for batch in batches(list(prompts))]
        return torch.cat([unit(self.model.encode_text(batch.to(self.device))) for batch in tokens])

    @torch.inference_mode()
    def image(self, images_B3HW: Tensor) -> Tensor:
        """Unit features [B, D] of uint8 images of any size; several metrics of the same tensor compute them once."""
        for images, features_BD in self.latest:
            if images() is images_B3HW:
                return features_BD
        features_BD = torch.cat([unit(self.model.encode_image(self.prepare(batch))) for batch in batches(images_B3HW)])
        self.latest = [(weakref.ref(images_B3HW), features_BD), *self.latest[:1]]
        return features_BD

    def prepare(self, images_B3HW: Tensor) -> Tensor:
        """uint8 images as the model's input: open_clip's own evaluation transform, which works on PIL images."""
        assert images_B3HW.dtype == torch.uint8, f"images are {images_B3HW.dtype}, not uint8"
        return torch.stack([self.transform(to_pil_image(image)) for image in images_B3HW.cpu()]).to(self.device)

    def similarity(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """The score, float32 [B] on the CPU, of image features against the text features in the same rows."""
        assert image_BD.shape == text_BD.shape, f"{tuple(image_BD.shape)} images, {tuple(text_BD.shape)} texts"
        return self.scale * (image_BD * text_BD).sum(1).float().cpu()

    def score(self, images_B3HW: Tensor, text_BD: Tensor) -> Tensor:
        """The score, float32 [B] on the CPU, of uint8 images against the features of their prompts."""
        return self.similarity(self.image(images_B3HW), text_BD)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score, float32 [B] on the CPU, of uint8 images against as many prompts."""
        return self.score(images_B3HW, self.text(prompts))


def trained_with(model: str, pretrained: str | None, quick_gelu: bool | None, normalisation: str | None) -> dict:
    """What open_clip.create_model needs to know of how weights were trained: activation and preprocessing.

    A folder's own configuration says both, and so does a tag's entry, of which open_clip leaves out the activation. Of
    a file it knows neither and takes the name's own activation and OpenAI's normalisation; here the file takes what the
    tags of its name agree upon. Raises ValueError where they do not. How an image that is not square is resized is left
    to open_clip where they do not agree: ours are square.
    """
    if normalisation is not None and normalisation not in NORMALISATIONS:
        raise ValueError(f"scorer.normalisation={normalisation} is unknown; choose from {', '.join(NORMALISATIONS)}")
    if model.startswith((LOCAL, HUB)):
        return {}
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        return activation(is_quick(model, pretrained))
    entries = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    quick = {is_quick(model, tag) for tag in tags} or {is_quick(model, None)}
    statistics = {(tuple(entry["mean"]), tuple(entry["std"])) for entry in entries}
    ways = {"quick_gelu=true or false": quick_gelu is None and len(quick) > 1,
            f"normalisation={', '.join(NORMALISATIONS)}": normalisation is None and len(statistics) != 1}  # fmt: skip
    if left := [f"scorer.{way}" for way, is_open in ways.items() if is_open]:
        raise ValueError(
            f"{pretrained} does not say how it was trained, and {model} leaves it open: give {' and '.join(left)} (or "
            "a preference's own), as its model card says"
        )
    mean, std = NORMALISATIONS[normalisation] if normalisation else statistics.pop()
    shape = {key: {entry[key] for entry in entries} for key in ("interpolation", "resize_mode")}
    settled = {key: values.pop() for key, values in shape.items() if len(values) == 1}
    return {
        **activation(quick.pop() if quick_gelu is None else quick_gelu),
        "force_preprocess_cfg": {"mean": mean, "std": std, **settled},
    }


def is_quick(model: str, tag: str | None) -> bool:
    """Whether weights have QuickGELU: many such tags hang on names whose configuration has the plain activation."""
    configured = open_clip.get_model_config(model) or {}
    return bool(configured.get(GELU) or open_clip.get_pretrained_cfg(model, tag or "").get(GELU))


def activation(quick: bool) -> dict[str, bool]:
    # force_quick_gelu=False leaves the configuration's own; the model's argument goes over it.
    return {"force_quick_gelu": quick, GELU: quick}


def unit(features_BD: Tensor) -> Tensor:
    return F.normalize(features_BD, dim=-1)


def batches(rows: Rows) -> list[Rows]:
    """`rows` (a list or a tensor) in slices of BATCH, cut by index."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """open_clip talks on the root logger, errors included; what went wrong is in the exception."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers  # logging.info on a bare root logger installs one


def check_names(model: str, pretrained: str | None) -> None:
    """Raises ValueError if open_clip has no such model or tag; open_clip itself would go on with random weights."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"no open_clip model in {folder}: {CONFIG_FILE} is missing; give its folder after {LOCAL}")
        check_config(folder / CONFIG_FILE)
    if model.startswith((LOCAL, HUB)):
        if pretrained:
            raise ValueError(f"scorer.pretrained={pretrained}, but {model} brings its weights: scorer.pretrained=null")
        return
    if model not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)) or "none"
        raise ValueError(f"open_clip has no model {model!r}; close names: {close}; or give {LOCAL}FOLDER")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not (pretrained and Path(pretrained).is_file()):
        known = ", ".join(tags)
        raise ValueError(f"open_clip's {model} has no weights {pretrained!r}; give a checkpoint file or one of {known}")


def check_config(file: Path) -> None:
    """Raises ValueError for a file that does not describe a model; open_clip raises whatever it stumbles over."""
    try:
        model_cfg = json.loads(file.read_text())["model_cfg"]
        absent = {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} describes no model: {type(error).__name__} {one_line(error)}") from error
    if absent:
        raise ValueError(f"{file} describes no model: its model_cfg lacks {', '.join(sorted(absent))}")


def check_tokens(model: nn.Module, tokenizer: Callable, name: str) -> None:
    """Raises ValueError for a tokenizer of a folder whose tokens the model has no embeddings for."""
    table = getattr(model, "token_embedding", None) or getattr(getattr(model, "text", None), "token_embedding", None)
    words = tokenizer.tokenizer.get_vocab() if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer) else {}
    if table is not None and words and (highest := max(words.values())) >= table.num_embeddings:
        rows = f"its {CONFIG_FILE} has a vocab_size of {table.num_embeddings}"
        raise ValueError(f"the tokenizer of {name} gives tokens up to {highest}, and {rows}: they do not match")


def check_safe(model: str, pretrained: str | None) -> None:
    """Raises ValueError for local weights in pickle form."""
    files = local_weights(model, pretrained)
    if files and not any(path.suffix == ".safetensors" for path in files):
        way = "scorer.allow_pickle=true (or a preference's own) reads it all the same"
        raise ValueError(f"{files[0]} holds pickles, which may run code; {way}")


def explain(model: str, pretrained: str | None, error: Exception) -> str:
    """One line for weights that could not be had."""
    if model.startswith(LOCAL) or (pretrained and Path(pretrained).is_file()):
        files = local_weights(model, pretrained)
        reason = "it holds no weights" if isinstance(error, StopIteration) else one_line(error) or type(error).__name__
        return f"open_clip could not load {files[0] if len(files) == 1 else model}: {reason}"
    arguments = ", ".join(repr(name) for name in (model, pretrained) if name)
    return (
        f"the weights of open_clip's {arguments} are not in the cache and could not be fetched; with a network, run "
        f'python -c "import open_clip; open_clip.create_model({arguments})" and bring the cache (HF_HOME) here, '
        f"or use a checkpoint file or {LOCAL}FOLDER"
    )


def local_weights(model: str, pretrained: str | None) -> list[Path]:
    """The checkpoints on this disk; none for open_clip's tags."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        return sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".pth", ".pt"})
    return [Path(pretrained)] if pretrained and Path(pretrained).is_file() else []


def local_weights_hash(model: str, pretrained: str | None) -> str | None:
    """12 hex digits of the sha256 of a checkpoint on disk; None for open_clip's tags, which name their weights."""
    files = local_weights(model, pretrained)
    digests = b"".join(bytes.fromhex(digest(path)) for path in files)
    return hashlib.sha256(digests).hexdigest()[:12] if files else None
