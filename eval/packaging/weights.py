"""Weights of compiled packages beside their code: each tensor once, in safetensors files that packages share.

A tensor's key is the digest of its content, so that text encoder, denoiser and decoder, and packages for other batches,
sizes or steps, find what they have in common whatever their code calls it.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "weights.safetensors"


def write_weights(constants: Mapping[str, Mapping[str, Tensor]], folder: Path, shared: Path | None) -> dict[str, Any]:
    """Writes what is not in `shared`, another package's file, and gives what package.json says: the files, and the key
    of each graph's constants by the names that its code has. ValueError where `shared` has none of them."""
    keys = {graph: {name: key_of(tensor) for name, tensor in named.items()} for graph, named in constants.items()}
    every = {keys[graph][name]: tensor for graph, named in constants.items() for name, tensor in named.items()}
    files = []
    if shared is not None:
        with safe_open(shared, framework="pt") as file:
            kept = every.keys() & set(file.keys())
        if not kept:
            raise ValueError(f"package.weights={shared} has no weight of this model: package.weights=beside writes one")
        every = {key: tensor for key, tensor in every.items() if key not in kept}
        files.append(os.path.relpath(shared, folder))
    if every:
        save_file({key: tensor.detach().cpu().clone() for key, tensor in every.items()}, folder / FILE)
        files.append(FILE)
    return {"weights": files, "constants": keys}


def key_of(tensor: Tensor) -> str:
    """The digest of a tensor's dtype, shape and numbers. ValueError where its numbers lie in another order than its
    axes, which a file would not keep."""
    if not tensor.is_contiguous():
        which = f"a constant of shape {tuple(tensor.shape)} has strides {tensor.stride()}"
        raise ValueError(f"{which}, which no safetensors file keeps: package.weights=inside")
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(content.data)
    return digest.hexdigest()[:32]
