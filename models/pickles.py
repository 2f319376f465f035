"""The tensors of old checkpoints, which are pickles, without the other objects in them.

Checkpoints of a training also hold what belongs to it (callbacks, counters), of classes that nobody has installed. All
but tensors becomes an empty stand-in, so that nothing a file names is imported or called.
"""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TENSORS = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"), ("torch.serialization", "_get_layout"),
}  # fmt: skip
DAMAGED = (RuntimeError, EOFError, pickle.UnpicklingError, UnicodeDecodeError, ValueError, KeyError, AttributeError)


class StandIn:
    """In the place of an object of any class: takes whatever its pickle does to it, and holds nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = nothing


class Unpickler(pickle.Unpickler):
    """Torch loads with this module in the place of `pickle`; storages it makes itself."""

    def find_class(self, module: str, name: str):
        return super().find_class(module, name) if (module, name) in TENSORS else StandIn


def load(opened, **options):
    return Unpickler(opened, **options).load()


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The state dict in the file, also where it is nested in a checkpoint. ValueError where there is none."""
    try:
        weights = torch.load(file, map_location="cpu", pickle_module=sys.modules[__name__], weights_only=False)
    except DAMAGED as error:
        raise ValueError(f"it is no checkpoint of torch's: {str(error).splitlines()[0]}") from error
    while isinstance(weights, Mapping) and "state_dict" in weights:
        weights = weights["state_dict"]
    tensors = weights.items() if isinstance(weights, Mapping) else ()
    tensors = {key: value for key, value in tensors if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("it holds no weights")
    return tensors
