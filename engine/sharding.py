"""Training whose weights, gradients and optimiser states are spread over processes, as accelerate's FSDP file asks."""

import copy

from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.sections.training import TrainConfig

UNITS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)  # each is gathered while it runs, and let go again


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes share one network."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(config: TrainConfig, accelerator: Accelerator) -> None:
    """ValueError for trainings that cannot be done in shards."""
    if is_sharded(accelerator) and config.optimizer == "adafactor":
        raise ValueError("train.optimizer=adafactor sums over whole rows and does not go with FSDP; choose adamw8bit")
    if is_sharded(accelerator) and config.compile:
        raise ValueError("train.compile=true does not go with FSDP; leave one of them out")


def copy_to_shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy that `accelerator.prepare` may cut into shards; `model`, whole, rests on the CPU."""
    names = sorted({type(module).__name__ for module in model.modules() if isinstance(module, UNITS)})
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
    return copy.deepcopy(model.to("cpu"))


def as_number(norm: Tensor) -> Tensor:
    """A norm over all shards, the same number on every rank."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
