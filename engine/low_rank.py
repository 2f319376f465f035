"""Training of a low-rank update alone (LoRA, Hu et al. 2021, arXiv 2106.09685): W + B·A beside frozen weights, by PEFT.

Gradients, optimiser states and the EMA are then those of the update. When a stage ends the update is added to the
weights, so that nothing behind it knows of this.
"""

from importlib.util import find_spec

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimstep.engine.sharding import is_deepspeed, is_sharded


def check_peft(key: str, rank: int) -> None:
    """ValueError for a rank above 0 where PEFT is not installed."""
    if rank and find_spec("peft") is None:
        raise ValueError(f"{key}={rank} needs PEFT: pip install -e '.[lora]'")


def check_low_rank(rank: int, accelerator: Accelerator) -> None:
    """ValueError where PEFT is not installed, and where weights are in shards."""
    check_peft("train.lora_rank", rank)
    if rank and (is_sharded(accelerator) or is_deepspeed(accelerator)):
        raise ValueError(f"train.lora_rank={rank} trains so little that nothing is cut into shards; set +hardware=gpu1")


def add_low_rank(network: nn.Module, rank: int, seed: int) -> None:
    """An update of this rank in float32, zero at first, for every linear layer; all else is frozen.

    A layer that a block mask closes by itself, as one of FLUX's, is frozen, too: its update would not be masked.

    ValueError for a network without linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    if not linear:
        raise ValueError(f"train.lora_rank={rank}: a {type(network).__name__} has no linear layers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same on every process
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # of a network in half precision, too


def low_rank_weights(network: nn.Module) -> dict[str, Tensor]:
    """The update alone, as diffusers reads it: {"LAYER.lora_A.weight": [rank, in], "LAYER.lora_B.weight": …}."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network)


def merge_low_rank(network: nn.Module) -> None:
    """Adds the updates to the weights, under their old names; all of them are trainable again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            network.set_submodule(name, module.get_base_layer())
    vars(network).pop("peft_config", None)
    network.requires_grad_(True)
