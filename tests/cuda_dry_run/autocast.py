"""Autocast for fakes: what CUDA's autocast casts, cast where Python calls it; and generators of the wrong device.

The lists are those of aten/src/ATen/autocast_mode.h; what they cast inside C++ is not seen here.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.cuda_dry_run.mode import CUDA, DeviceFault

LOWER = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm", "addmv",
    "matmul", "mm", "mv", "bmm", "addbmm", "baddbmm", "linear", "einsum", "scaled_dot_product_attention",
}  # fmt: skip
FLOAT32 = {
    "exp", "expm1", "log", "log2", "log10", "log1p", "reciprocal", "rsqrt", "pow", "rpow", "softplus", "layer_norm",
    "group_norm", "cosine_similarity", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cdist",
    "logsumexp", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "norm", "interpolate", "nll_loss",
}  # fmt: skip


class Generator(torch.Generator):
    """A generator that knows which device it is of; it draws on the host."""

    def __new__(cls, device: str | torch.device = "cpu"):
        made = super().__new__(cls, "cpu")
        made.place = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    def __init__(self, device: str | torch.device = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return self.place


def check_generator(draw: Generator, leaves: list) -> None:
    """DeviceFault where a generator of one device draws on another."""
    on_gpu = any(isinstance(x, FakeTensor) or str(x).startswith("cuda")
                 for x in leaves if isinstance(x, (torch.Tensor, torch.device, str)))  # fmt: skip
    if on_gpu != (draw.device.type == "cuda"):
        expected = "cuda" if on_gpu else "cpu"
        raise DeviceFault(f"Expected a '{expected}' device type for generator but found '{draw.device.type}'")


class Casts(TorchFunctionMode):
    """Casts the fakes among a call's arguments while autocast is on for CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(draw := kwargs.get("generator"), Generator):
            check_generator(draw, tree_leaves((args, kwargs)))
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if name not in LOWER and name not in FLOAT32:
            return func(*args, **kwargs)
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32

        def cast(x):
            fits = isinstance(x, FakeTensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if fits else x

        args, kwargs = tree_map(cast, (args, kwargs))
        return func(*args, **kwargs)
