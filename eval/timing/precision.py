"""In which precision images are sampled and decoded, by networks whose weights are float32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

TF32_CAPABILITY = (8, 0)


def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies float32 numbers as TF32, with 10 bits of mantissa, several times as fast."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY


def settled(precision: str | None, device: torch.device) -> str:
    """`precision`, or what the device is good at where that is None: tf32 where there is such a thing, else float32.

    Raises ValueError for tf32 on a device without it.
    """
    if precision == "tf32" and not has_tf32(device):
        raise ValueError(
            f"sampling.precision=tf32 needs a CUDA device of compute capability 8.0, and this is {device}; "
            "leave it out, or choose float32 or bfloat16"
        )
    return precision or ("tf32" if has_tf32(device) else "float32")


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Whether float32 products and convolutions may be TF32; by torch's default convolutions may, and products not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def products_on(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """What a precision makes of products on a device; beside bfloat16, what stays float32 is TF32.

    Where there is no TF32 nothing is switched: the switch is the process's, and a CPU's threads draw side by side.
    """
    return products(precision != "float32") if has_tf32(device) else nullcontext()


@contextmanager
def computing(precision: str, weights: Tensor) -> Iterator[None]:
    """What a UNet is called in, whose weights are such: half precision weights leave nothing to choose."""
    autocast = precision == "bfloat16" and weights.dtype == torch.float32
    half = torch.autocast(weights.device.type, torch.bfloat16) if autocast else nullcontext()
    with products_on(weights.device, precision), half:
        yield
