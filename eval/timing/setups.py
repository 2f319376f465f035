"""How a pipeline runs: number format, attention kernel, memory format, compilation, quantisation.

A setup changes a pipeline's networks in place, so each setup has a pipeline of its own; what a device or an
installation cannot run says why.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimstep.eval.timing.precision import has_tf32, products
from slimstep.models.pipeline import quiet

DTYPES = ("float32", "tf32", "float16", "bfloat16")
# vanilla: softmax(QKᵀ)V written out, one operation after the other; the others are kernels of
# scaled_dot_product_attention, 'sdpa' being the one that torch chooses.
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION = ("sdpa", "vanilla", *KERNELS)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# regional: the transformer layers alone, one graph for all; cudagraphs: eager kernels, launched as one graph.
GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")
COMPILE = ("eager", "default", "max-autotune-no-cudagraphs", "regional", *GRAPHS)
QUANTIZE = ("none", "int8", "fp8")


class CannotRunError(Exception):
    """This device or installation cannot run this setup; says why."""


@dataclass(frozen=True)
class Setup:
    """One way to run a pipeline. The defaults are diffusers as it comes, but that float32 is strictly that: torch lets
    a GPU's convolutions round to TF32, and here they do so with dtype `tf32` only.

    `attention` is that of UNet and ControlNets. `quantize` int8 and fp8 are dynamic, of the linear layers inside
    transformer blocks (torchao). `capture` makes the whole loop one CUDA graph (eval/timing/capture.py). Raises
    ValueError for values that are none.
    """

    compile: str = "eager"
    attention: str = "sdpa"
    dtype: str = "float32"
    memory_format: str = "contiguous"
    fused_qkv: bool = False
    quantize: str = "none"
    capture: bool = False

    def __post_init__(self) -> None:
        for name, known in (("compile", COMPILE), ("attention", ATTENTION), ("dtype", DTYPES),
                            ("memory_format", FORMATS), ("quantize", QUANTIZE)):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {tuple(known)}")

    def __str__(self) -> str:
        """What differs from the defaults: 'bfloat16, channels_last, compile default'."""
        words = [self.dtype, f"{self.attention} attention", self.memory_format,
                 "eager" if self.compile == "eager" else f"compile {self.compile}"]  # fmt: skip
        words += ["fused QKV"] if self.fused_qkv else []
        words += [self.quantize] if self.quantize != "none" else []
        return ", ".join(words + (["captured"] if self.capture else []))

    @property
    def key(self) -> str:
        """A file name."""
        return "_".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


def all_setups(**choices: Any) -> list[Setup]:
    """Every combination of the values given for each field."""
    return [Setup(**dict(zip(choices, values, strict=True))) for values in product(*choices.values())]


def check_runs(setup: Setup, device: torch.device) -> None:
    """Raises CannotRunError for what this device cannot run at all, and for what does not go together."""
    on_gpu = device.type == "cuda"
    if setup.fused_qkv and setup.attention == "vanilla":
        raise CannotRunError("fused QKV comes with an attention of its own, and not with the vanilla one")
    if setup.capture and setup.compile in GRAPHS:
        raise CannotRunError(f"the captured loop is one CUDA graph, and {setup.compile} would nest another in it")
    if setup.dtype == "tf32" and not on_gpu:
        raise CannotRunError("TF32 is a format of CUDA devices")
    if setup.dtype == "tf32" and not has_tf32(device):
        raise CannotRunError("TF32 needs compute capability 8.0")
    if (setup.capture or setup.compile in GRAPHS) and not on_gpu:
        raise CannotRunError("CUDA graphs need a CUDA device")
    if setup.attention in ("efficient", "cudnn") and not on_gpu:
        raise CannotRunError("this attention kernel needs a CUDA device")
    if setup.quantize == "fp8" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise CannotRunError("fp8 needs a CUDA device of compute capability 8.9")
    if setup.quantize != "none" and not find_spec("torchao"):
        raise CannotRunError("quantization needs torchao: pip install torchao")


def prepare(pipeline: DiffusionPipeline, setup: Setup, device: torch.device) -> DiffusionPipeline:
    """The pipeline, changed in place to run so; call it inside `running`. Raises CannotRunError."""
    check_runs(setup, device)
    with quiet():
        pipeline.to(device, setup.torch_dtype)
    nets = controlnets(pipeline)
    if len(nets) > 1 and setup.compile in GRAPHS:
        raise CannotRunError("diffusers marks no steps for the CUDA graphs of several ControlNets")
    for network in (pipeline.unet, *nets, pipeline.vae):
        network.to(memory_format=FORMATS[setup.memory_format])
    for network in (pipeline.unet, *nets):
        if setup.attention == "vanilla":
            network.set_attn_processor(AttnProcessor())
        elif setup.attention in KERNELS:
            use_kernel(network, KERNELS[setup.attention])
    if setup.fused_qkv:
        pipeline.unet.fuse_qkv_projections()
        pipeline.vae.fuse_qkv_projections()
    if setup.quantize != "none":
        quantize(pipeline.unet, setup.quantize)
    compile_networks(pipeline, setup)
    return pipeline


def controlnets(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """None, one or several."""
    controlnet = getattr(pipeline, "controlnet", None)
    if isinstance(controlnet, MultiControlNetModel):
        return list(controlnet.nets)
    return [] if controlnet is None else [controlnet]


def use_kernel(network: nn.Module, kernel: SDPBackend) -> None:
    """Attention through this kernel alone.

    The choice is made inside the forward, so that a compiled graph contains it: dynamo guards no choice from outside,
    and its cache on the disk would hand one kernel's code to another.
    """
    forward = network.forward

    @functools.wraps(forward)
    def limited(*args, **kwargs):
        with sdpa_kernel(kernel):
            return forward(*args, **kwargs)

    network.forward = limited


def quantize(unet: nn.Module, kind: str) -> None:
    """Dynamic quantization of the linear layers of transformer blocks: elsewhere it costs more than it saves."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    config = {"int8": Int8DynamicActivationInt8WeightConfig, "fp8": Float8DynamicActivationFloat8WeightConfig}[kind]
    quantize_(unet, config(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "transformer_blocks" in name)


def compile_networks(pipeline: DiffusionPipeline, setup: Setup) -> None:
    """UNet, ControlNet and VAE decoder as whole graphs, or the UNet's transformer layers alone."""
    if setup.compile == "eager":
        return
    torch.compiler.reset()  # more than eight graphs of one class would be refused
    if setup.compile == "regional":
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
        return
    if setup.compile == "cudagraphs":
        how: dict[str, Any] = {"backend": "cudagraphs"}
    else:
        how = {"mode": setup.compile, "fullgraph": True}
    pipeline.unet = torch.compile(pipeline.unet, **how)
    pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, **how)
    compiled = [torch.compile(net, **how) for net in controlnets(pipeline)]
    if len(compiled) > 1:
        pipeline.controlnet.nets = nn.ModuleList(compiled)
    elif compiled:
        (pipeline.controlnet,) = compiled


@contextmanager
def running(setup: Setup) -> Iterator[None]:
    """What is global while a setup runs: the precision of float32 products and convolutions."""
    with products(tf32=setup.dtype == "tf32"):
        yield
