"""Blocks whose linear layers compute in int8 or fp8: weights scaled per output channel, activations per token.

Axes: R rows of an input (tokens of all samples), I inputs of a layer, O its outputs.

Dynamic quantization: y = x Wᵀ with x_r ≈ a_r · q_r and w_n ≈ b_n · v_n, where a_r = max|x_r| / 127 and b_n = max|w_n| /
127, so that y_rn = a_r b_n · (q_r · v_n), the sum exact in int32. fp8 (e4m3) has 448 in the place of 127. No sample
changes what another one gives. Layers that scale and shift norms by an embedding stay as they are: they have a row for
each sample, and every token depends on them.

The weights of such a layer are those of the float layer, under the same names, and files hold them: an export stays one
that can be trained, pruned and given a LoRA. Their low-precision copy is made when the network is set to evaluate, or
moved. Where gradients are needed the layer computes with what that copy stands for, in float, and they pass straight
through the rounding (Bengio et al. 2013, arXiv 1308.3432): recovery trains the network that is exported.

This file travels with exports, in the class file of their network. torchao, which benchmarks quantize whole networks by
(eval/timing/inference.py), does not: it is another package, and its tensors are neither trained nor stored plainly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUMBERS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # and the largest that is used
SMALLEST = 1e-10  # scale · largest, so that rows of zeros divide by something
WHOLE_TILES = 16  # GPUs multiply sides that are multiples of it, and more rows than so many


# ---- numbers ----


def low_precision(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Values of the dtype and the float32 scale [..., 1] of each row: x ≈ scale · values."""
    kind, largest = NUMBERS[dtype]
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / largest
    scaled = x / scale
    return (scaled.round_() if dtype == "int8" else scaled).to(kind), scale


def low_precision_product(x_RI: Tensor, weight_OI: Tensor, scale_O: Tensor, dtype: str) -> Tensor:
    """x Wᵀ [R, O] in float32 or bfloat16, for a weight of the dtype whose sides are multiples of WHOLE_TILES."""
    values, scale_R1 = low_precision(x_RI, dtype)
    rows, width = x_RI.shape
    more_rows = WHOLE_TILES + 1 - rows if rows <= WHOLE_TILES else 0
    if more_rows or width < weight_OI.shape[1]:
        values = padded(values, more_rows, weight_OI.shape[1] - width)
        scale_R1 = F.pad(scale_R1, (0, 0, 0, more_rows), value=1.0)
    if dtype == "int8":
        product = torch._int_mm(values, weight_OI.t()).float().mul_(scale_R1).mul_(scale_O)
    else:  # by rows into bfloat16: the one kind that the kernels of all GPUs with fp8 have
        scales = {"scale_a": scale_R1, "scale_b": scale_O[None]}
        product = torch._scaled_mm(values, weight_OI.t(), **scales, out_dtype=torch.bfloat16)
    return product[:rows]


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with so many rows and columns of zeros more; torch pads no fp8."""
    if values.dtype == torch.int8:
        return F.pad(values, (0, columns, 0, rows))
    return F.pad(values.view(torch.int8), (0, columns, 0, rows)).view(values.dtype)


def rounded_straight_through(x: Tensor, dtype: str) -> Tensor:
    """What x is in the dtype, in x's own; its gradient is that of x."""
    values, scale = low_precision(x.detach(), dtype)
    return (values.float() * scale).to(x.dtype) + (x - x.detach())


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def check_computes(dtype: str, device: torch.device) -> None:
    """ValueError for a dtype that this device cannot compute in."""
    if dtype == "fp8" and device.type != "meta" and not has_fp8(device):
        here = f"this is {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
        raise ValueError(f"fp8 needs a CUDA device of compute capability 8.9 or newer, and {here}; int8 runs here")


# ---- layers ----


class QuantizedLinear(nn.Linear):
    """A linear layer that computes in `computes_in`. Its float weight is the one that counts; `low_weight` and
    `low_scale` are its copy, None while the layer is trained, on the meta device or cut into shards."""

    computes_in: str
    low_weight: Tensor | None
    low_scale: Tensor | None
    version: int

    def forward(self, x: Tensor) -> Tensor:
        is_learning = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not is_learning and not self.training and not torch.compiler.is_compiling() and self.is_outdated():
            self.settle()
        if is_learning or self.low_weight is None:
            check_computes(self.computes_in, x.device)
            parts = (rounded_straight_through(tensor, self.computes_in) for tensor in (x, self.weight))
            return F.linear(*parts, self.bias)
        product = low_precision_product(x.flatten(0, -2), self.low_weight, self.low_scale, self.computes_in)
        y_RO = product[:, : self.out_features]
        y_RO = y_RO if self.bias is None else y_RO.add_(self.bias)
        return y_RO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def is_outdated(self) -> bool:
        """Whether the weight has changed since its copy was made. Changes of `weight.data` cannot be seen: `eval()`
        makes the copy anew."""
        return not self.weight.is_inference() and self.weight._version != self.version

    def settle(self) -> None:
        """Makes the copy of the weight, or lets it go where there is none to be made."""
        weight, self.version = self.weight, 0
        self.register_buffer("low_weight", None, persistent=False)
        self.register_buffer("low_scale", None, persistent=False)
        if not weight.is_inference():
            self.version = weight._version
        if self.training or weight.is_meta or type(weight) is not nn.Parameter:
            return
        check_computes(self.computes_in, weight.device)
        with torch.inference_mode(False), torch.no_grad():
            values, scale_O1 = low_precision(weight, self.computes_in)
            more = [-size % WHOLE_TILES for size in weight.shape]
            self.low_weight, self.low_scale = padded(values, *more), F.pad(scale_O1[:, 0], (0, more[0]), value=1.0)

    def train(self, mode: bool = True) -> "QuantizedLinear":
        super().train(mode)
        self.settle()
        return self

    def _apply(self, fn, recurse: bool = True) -> "QuantizedLinear":
        """As in torch, for `to`, `half` and their like; the copy is made of the weight as it is then."""
        self.low_weight = self.low_scale = None
        super()._apply(fn, recurse)
        self.settle()
        return self


@cache
def quantized_class(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class of a quantized layer, for that of a plain one or of one that looks at a block mask."""
    if issubclass(kind, QuantizedLinear):
        return kind
    return QuantizedLinear if kind is nn.Linear else type(f"Quantized{kind.__name__}", (kind, QuantizedLinear), {})


# ---- blocks ----


def token_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """{path: layer} of the linear layers of a block that take tokens; those of its copies are not among them."""
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {path: module for path, module in linears.items() if takes_tokens(path)}


def takes_tokens(path: str) -> bool:
    """Whether the layer is none of those that an embedding of the time goes through, by diffusers' names."""
    names = path.split(".")
    conditioned = any(name.startswith("norm") or name.endswith(("_mod", "time_emb_proj")) for name in names)
    return not conditioned and names[0] != "copies"


def quantize(layers: Sequence[nn.Linear], dtype: str) -> None:
    """Makes linear layers compute in the dtype, in place. ValueError, before any is changed, where it cannot be."""
    for layer in layers:
        check_computes(dtype, layer.weight.device)
    for layer in layers:
        layer.__class__, layer.computes_in = quantized_class(type(layer)), dtype
        layer.settle()


@contextmanager
def quantizing(layers: Sequence[nn.Linear], dtype: str) -> Iterator[None]:
    """While this runs the layers compute in the dtype; afterwards they are as they were."""
    before = [(layer, type(layer), getattr(layer, "computes_in", None)) for layer in layers]
    quantize([layer for layer, _, _ in before], dtype)
    try:
        yield
    finally:
        for layer, kind, own in before:
            if own:
                quantize([layer], own)
                continue
            layer.__class__ = kind
            for name in ("low_weight", "low_scale"):
                del layer._buffers[name]
                layer._non_persistent_buffers_set.discard(name)
            del layer.computes_in, layer.version
