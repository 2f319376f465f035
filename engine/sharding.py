"""Training whose weights, gradients or optimiser states are spread over processes, as accelerate's files ask.

FSDP2 cuts weights, gradients and optimizer states; the loop trains a copy, and reads its finished weights in one piece.
No rank but the first holds a whole network in main memory.
DeepSpeed's ZeRO-2 cuts gradients and optimizer states, and clips and steps inside `accelerator.backward`.
"""

import copy
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slimstep.engine.config import TrainConfig

UNITS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)  # each is gathered while it runs, and let go again


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes share one network."""
    return accelerator.distributed_type == DistributedType.FSDP


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_sharding(config: TrainConfig, accelerator: Accelerator, networks: Iterable[str] = ()) -> None:
    """ValueError for trainings that cannot be done in shards; `networks` are trained beside the student."""
    if is_sharded(accelerator) or is_deepspeed(accelerator):
        if names := ", ".join(networks):
            raise ValueError(f"training {names} beside the student does not go with FSDP or DeepSpeed; use DDP")
        if config.optimizer == "adafactor":
            raise ValueError("train.optimizer=adafactor sums over whole rows, and shards have none; choose adamw8bit")
        if config.compile:
            raise ValueError("train.compile=true does not go with FSDP or DeepSpeed; leave one of them out")
    if is_deepspeed(accelerator) and config.accumulation > 1:
        raise ValueError(f"train.accumulation={config.accumulation} does not go with DeepSpeed; raise train.batch_size")


def configure_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """What DeepSpeed, where it is used, has to know before it prepares a network: it clips by itself."""
    if is_deepspeed(accelerator):
        options = {"train_micro_batch_size_per_gpu": config.batch_size, "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm}  # fmt: skip
        accelerator.state.deepspeed_plugin.deepspeed_config.update(options)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype:
    """What networks compute in, by mixed precision or by an autocast of DeepSpeed's own."""
    if is_deepspeed(accelerator):
        autocast = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
        if autocast.get("enabled"):
            return getattr(torch, autocast["dtype"])
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes.get(accelerator.mixed_precision, torch.float32)


def copy_to_shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy that `accelerator.prepare` may cut into shards. It takes the weights with it, and `model` has none until
    `with_room`: every rank would hold a whole network beside its shard."""
    units = {module for module in model.modules() if isinstance(module, UNITS)}
    units |= {model.get_submodule(block) for block in getattr(model, "kept_blocks", ())}  # a transformer's
    names = sorted({type(module).__name__ for module in units})
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
    model.to("cpu")
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    replace_weights(model, torch.device("meta"))
    return copied


def with_room(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on the device, with memory for the weights that it gave away; their values are undefined."""
    replace_weights(model, device)
    return model.to(device)


def replace_weights(model: nn.Module, device: torch.device) -> None:
    """New parameters of the same kind, without values."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty_like(old, device=device)
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def whole_weights(network: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """A trained network's state in one piece, on rank 0 at least; all ranks have to ask together."""
    if is_deepspeed(accelerator) and not accelerator.is_main_process:
        return {}  # accelerate would copy all of them into every rank's memory
    return accelerator.get_state_dict(network)


def as_number(norm: Tensor | float, accelerator: Accelerator) -> Tensor:
    """A gradient's norm over all shards, the same number on every rank."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=accelerator.device)
