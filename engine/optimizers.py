"""The optimisers of the training loop, and what each keeps beside a weight and its gradient.

adamw      PyTorch's, fused into one kernel: two float32 moments, 8 bytes a weight.
adamw8bit  torchao's (Dettmers et al. 2022): the moments as blocks of 256 8-bit numbers and a scale, 2 bytes a weight;
           small tensors keep float32. It compiles itself, once per shape.
adafactor  transformers', with our learning rate: sums over rows and over columns, next to nothing; no first moment
           (Shazeer & Stern 2018).
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers.optimization import Adafactor

from slimstep.engine.config import TrainConfig


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `train.optimizer` names. ValueError where its library is not installed."""
    check_optimizer(config)
    decay = config.weight_decay
    if config.optimizer == "adafactor":
        own_rate = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(parameters, config.learning_rate, weight_decay=decay, **own_rate)
    first, second = config.betas
    if config.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, config.learning_rate, betas=(first, second), weight_decay=decay)
    return torch.optim.AdamW(parameters, config.learning_rate, (first, second), weight_decay=decay, fused=True)


def check_optimizer(config: TrainConfig) -> None:
    """ValueError where the library of `train.optimizer` is not installed."""
    if config.optimizer == "adamw8bit" and find_spec("torchao") is None:
        raise ValueError("train.optimizer=adamw8bit needs torchao: pip install -e '.[quantize]', or choose adafactor")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """In place where the optimiser keeps its rate as a tensor, as compiled ones do."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
