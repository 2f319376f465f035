"""How a pipeline runs: number format, attention kernel, memory format, compilation, quantisation.

An inference config changes a pipeline's networks in place, so each has a pipeline of its own; what a device or an
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
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimstep.eval.timing.precision import has_tf32, products
from slimstep.models.families.quantized import QuantizedLinear, has_fp8
from slimstep.models.family import family_of
from slimstep.models.networks import network_of, part_of
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
# Kernels of other packages (flex: torch's own), and their names in diffusers' dispatcher, which the attention of some
# transformers goes through.
BACKENDS = {"flash_attn": "flash", "flex": "flex", "sageattention": "sage", "xformers": "xformers"}
SOFTMAX = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0)  # those for which xFormers has a like one
ATTENTION = ("sdpa", "vanilla", *KERNELS, *BACKENDS)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# regional: the transformer layers alone, one graph for all; cudagraphs: eager kernels, launched as one graph.
GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")
COMPILE = ("eager", "default", "max-autotune-no-cudagraphs", "regional", *GRAPHS)
QUANTIZE = ("none", "int8", "fp8")


class CannotRunError(Exception):
    """This device or installation cannot run this inference config; says why."""


@dataclass(frozen=True)
class InferenceConfig:
    """One way to run a pipeline. The defaults are diffusers as it comes, but that float32 is strictly that: torch lets
    a GPU's convolutions round to TF32, and here they do so with dtype `tf32` only.

    `attention` is that of UNet or transformer and ControlNets. `quantize` int8 and fp8 are dynamic, of the linear
    layers inside transformer blocks (torchao). `capture` makes the whole loop one CUDA graph (eval/timing/capture.py).
    Raises ValueError for values that are none.
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
        return ", ".join(words + (["one CUDA graph"] if self.capture else []))

    @property
    def key(self) -> str:
        """A file name."""
        return "_".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


def combinations(**choices: Any) -> list[InferenceConfig]:
    """Every combination of the values given for each field."""
    return [InferenceConfig(**dict(zip(choices, values, strict=True))) for values in product(*choices.values())]


def check_runs(inference: InferenceConfig, device: torch.device) -> None:
    """Raises CannotRunError for what this device cannot run at all, and for what does not go together."""
    on_gpu = device.type == "cuda"
    if inference.fused_qkv and inference.attention == "vanilla":
        raise CannotRunError("fused QKV comes with an attention of its own, and not with the vanilla one")
    if inference.capture and inference.compile in GRAPHS:
        raise CannotRunError(f"the whole loop is one CUDA graph, and {inference.compile} would nest another in it")
    if inference.dtype == "tf32" and not on_gpu:
        raise CannotRunError("TF32 is a format of CUDA devices")
    if inference.dtype == "tf32" and not has_tf32(device):
        raise CannotRunError("TF32 needs compute capability 8.0")
    if (inference.capture or inference.compile in GRAPHS) and not on_gpu:
        raise CannotRunError("CUDA graphs need a CUDA device")
    if inference.attention in ("efficient", "cudnn") and not on_gpu:
        raise CannotRunError("this attention kernel needs a CUDA device")
    if inference.quantize == "fp8" and not has_fp8(device):
        raise CannotRunError("fp8 needs a CUDA device of compute capability 8.9")
    if inference.quantize != "none" and not find_spec("torchao"):
        raise CannotRunError("quantization needs torchao: pip install torchao")


def prepare(pipeline: DiffusionPipeline, inference: InferenceConfig, device: torch.device) -> DiffusionPipeline:
    """The pipeline, changed in place to run so; call it inside `running`. Raises CannotRunError."""
    check_runs(inference, device)
    with quiet():
        pipeline.to(device, inference.torch_dtype)
    nets, decoders = controlnets(pipeline), codecs(pipeline)
    if len(nets) > 1 and inference.compile in GRAPHS:
        raise CannotRunError("diffusers marks no steps for the CUDA graphs of several ControlNets")
    denoiser = network_of(pipeline)
    for network in (denoiser, *nets, *decoders):
        if inference.memory_format == "channels_last" and any(weight.ndim == 5 for weight in network.parameters()):
            raise CannotRunError(f"torch has no channels_last for the 3-D convolutions of {kind_of(network)}")
        network.to(memory_format=FORMATS[inference.memory_format])
    for network in (denoiser, *nets):
        if inference.attention == "vanilla":
            use_vanilla(network)
        elif inference.attention in KERNELS:
            use_kernel(network, KERNELS[inference.attention])
        elif inference.attention in BACKENDS:
            use_backend(network, inference.attention)
    if inference.fused_qkv:
        fuse_qkv(denoiser, inference.attention)
        for network in decoders:
            if hasattr(network, "fuse_qkv_projections"):
                network.fuse_qkv_projections()
    if inference.quantize != "none":
        quantize(denoiser, inference.quantize)
    compile_networks(pipeline, inference)
    return pipeline


def controlnets(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """None, one or several."""
    controlnet = getattr(pipeline, "controlnet", None)
    if isinstance(controlnet, MultiControlNetModel):
        return list(controlnet.nets)
    return [] if controlnet is None else [controlnet]


def codecs(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The VAE; none in pixel space."""
    return [*filter(None, [family_of(pipeline).codec(pipeline)])]


def use_vanilla(network: nn.Module) -> None:
    """Attention written out. Joint and rotated attentions of transformers have no such processor in diffusers."""
    if not isinstance(network, (UNet2DConditionModel, ControlNetModel, UNet2DModel)):
        raise CannotRunError(f"diffusers has no vanilla attention for {kind_of(network)}")
    network.set_attn_processor(AttnProcessor())


def use_backend(network: nn.Module, package: str) -> None:
    """Attention through another package's kernel: by diffusers' dispatcher, or by its switch for xFormers."""
    if package != "xformers" and not is_dispatched(network):
        raise CannotRunError(f"diffusers sends no attention of {kind_of(network)} through its dispatcher")
    if package != "flex" and not find_spec(package):
        raise CannotRunError(f"{package} is not installed: pip install {package.replace('_', '-')}")
    try:
        with quiet():
            if is_dispatched(network):
                # diffusers makes it the kernel of all networks of the process; the context takes that back.
                with attention_backend(AttentionBackendName.NATIVE):
                    network.set_attention_backend(BACKENDS[package])
            else:
                use_xformers(network)
    except (ImportError, RuntimeError, ValueError) as error:  # another version is wanted, or another device
        raise CannotRunError(str(error)) from error


def processors_of(network: nn.Module) -> list[Any]:
    """What computes each attention."""
    return [module.processor for module in network.modules() if getattr(module, "processor", None) is not None]


def is_dispatched(network: nn.Module) -> bool:
    return any(hasattr(processor, "_attention_backend") for processor in processors_of(network))


def use_xformers(network: nn.Module) -> None:
    """By diffusers' switch, which would put softmax attention in the place of any other, as Sana's linear one."""
    if other := {type(p).__name__ for p in processors_of(network) if not isinstance(p, SOFTMAX)}:
        raise CannotRunError(f"diffusers has xFormers' kernel for none of {kind_of(network)}'s {sorted(other)}")
    network.enable_xformers_memory_efficient_attention()


def fuse_qkv(network: nn.Module, attention: str) -> None:
    """The products of query, key and value as one. Some classes have the method, and it does nothing for them."""
    if attention == "xformers" and not is_dispatched(network):
        raise CannotRunError("fused QKV comes with an attention of its own, and not with xFormers'")
    if any(isinstance(module, QuantizedLinear) for module in network.modules()):
        raise CannotRunError("fused QKV would be products of floats where the student's blocks compute in int8 or fp8")
    if hasattr(network, "fuse_qkv_projections"):
        network.fuse_qkv_projections()
    if not any(getattr(module, "fused_projections", False) for module in network.modules()):
        raise CannotRunError(f"diffusers fuses no QKV of {kind_of(network)}")


def kind_of(network: nn.Module) -> str:
    """The name of diffusers' class."""
    return getattr(network, "STOCK", type(network)).__name__


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
    """Dynamic quantization of the linear layers of transformer blocks: elsewhere it costs more than it saves. Blocks
    that a student computes in int8 or fp8 stay as they are."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    config = {"int8": Int8DynamicActivationInt8WeightConfig, "fp8": Float8DynamicActivationFloat8WeightConfig}[kind]
    quantize_(unet, config(), filter_fn=lambda m, name: is_float_linear(m) and "transformer_blocks" in name)


def is_float_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)


def compile_networks(pipeline: DiffusionPipeline, inference: InferenceConfig) -> None:
    """Denoiser, ControlNet and VAE decoder as whole graphs, or the denoiser's transformer layers alone."""
    if inference.compile == "eager":
        return
    torch.compiler.reset()  # more than eight graphs of one class would be refused
    network = network_of(pipeline)
    if inference.compile == "regional":
        network.compile_repeated_blocks(fullgraph=True)
        return
    if inference.compile == "cudagraphs":
        how: dict[str, Any] = {"backend": "cudagraphs"}
    else:
        how = {"mode": inference.compile, "fullgraph": True}
    setattr(pipeline, part_of(pipeline), torch.compile(network, **how))
    for vae in codecs(pipeline):
        vae.decoder = torch.compile(vae.decoder, **how)
    compiled = [torch.compile(net, **how) for net in controlnets(pipeline)]
    if len(compiled) > 1:
        pipeline.controlnet.nets = nn.ModuleList(compiled)
    elif compiled:
        (pipeline.controlnet,) = compiled


@contextmanager
def running(inference: InferenceConfig) -> Iterator[None]:
    """What is global while an inference config runs: the precision of float32 products and convolutions."""
    with products(tf32=inference.dtype == "tf32"):
        yield
