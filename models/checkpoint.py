"""Single files of weights: what is looked at before one is read, and its tensors under Stable Diffusion's first names.

Web UIs have saved files in which the VAE's attention has diffusers' names amid the original ones, and others without
the `text_model.` in the text encoder's, which transformers has given up: they are read, too.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from slimstep.engine.quiet import one_line
from slimstep.models.pickles import load_pickled

SAFE, PICKLED = ".safetensors", (".ckpt", ".pt", ".pth")
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
                 "proj_attn": "proj_out", "group_norm": "norm"}  # fmt: skip
MIXED = re.compile(rf"(.*\bmid\.attn_1)\.({'|'.join(map(re.escape, VAE_ATTENTION))})\.(weight|bias)")
BARE_TEXT = re.compile(
    r"^((cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings|encoder|final_layer_norm)"
)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}  # what ModelSpec and diffusers call them
PREDICTION = "modelspec.prediction_type"
PREDICTION_KEYS = (PREDICTION, "modelspec.predict_key")  # the latter is what ComfyUI writes


def is_single_file(name_or_path: str | Path) -> bool:
    return Path(name_or_path).suffix in (SAFE, *PICKLED) and not Path(name_or_path).is_dir()


def check_file(file: str | Path, allow_pickle: bool) -> None:
    """ValueError for a file that is not there, or may run code where that is not allowed."""
    if not Path(file).is_file():
        raise ValueError(f"model {str(file)!r} does not exist")
    if Path(file).suffix in PICKLED and not allow_pickle:
        raise ValueError(f"model {str(file)!r} holds pickles, which may run code: model.allow_pickle=true reads it")


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file (memory-mapped) or of pickles. ValueError where it is damaged."""
    path = Path(file)
    try:
        weights = load_file(path) if path.suffix == SAFE else load_pickled(path)
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file: {one_line(error)}") from error
    return {original_name(key): value for key, value in weights.items()}


def original_name(key: str) -> str:
    """`first_stage_model.decoder.mid.attn_1.q.weight` for the same with `to_q` or `query`, and a text encoder's
    `transformer.text_model.` for a bare `transformer.`; others as they are."""
    key = BARE_TEXT.sub(r"\1text_model.", key)
    match = MIXED.fullmatch(key)
    return f"{match[1]}.{VAE_ATTENTION[match[2]]}.{match[3]}" if match else key


def stored_scheduling(file: str | Path, weights: dict[str, Tensor]) -> dict[str, object]:
    """Fields of the scheduler that the file itself tells: ModelSpec's metadata, or web UIs' keys `v_pred`, `ztsnr`."""
    metadata = {}
    if Path(file).suffix == SAFE:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    scheduling = {}
    if known := [PREDICTIONS[metadata[key]] for key in PREDICTION_KEYS if metadata.get(key) in PREDICTIONS]:
        scheduling["prediction_type"] = known[0]
    elif "v_pred" in weights:
        scheduling["prediction_type"] = "v_prediction"
    return scheduling | ({"rescale_betas_zero_snr": True} if "ztsnr" in weights else {})
