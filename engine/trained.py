"""The networks that the loop trains, each with an optimiser of its own, as accelerate prepares them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.engine.optimizers import make_optimizer
from slimstep.engine.sharding import configure_deepspeed


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its optimiser. Objectives call `learning` in its own updates, and `beside` in those of others: the
    same weights without DDP around them, which would wait there for gradients that never come."""

    network: nn.Module
    beside: nn.Module
    learning: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]

    def wants_gradients(self, yes: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(yes)

    def bare(self, accelerator: Accelerator) -> nn.Module:
        """The network without what accelerate, DDP and the compiler have put around it."""
        # Without accelerate's autocast around it: a network just trained and one read from its file compute alike.
        # Accelerate wraps the compiled one, which is let go: unwrapping DDP would leave it, and its names of weights.
        compiled = self.beside is not self.network
        bare = self.network if compiled else accelerator.unwrap_model(self.learning, keep_fp32_wrapper=False)
        vars(self.network).pop("_original_forward", None)
        return bare


def prepared(
    networks: Mapping[str, nn.Module], config: TrainConfig, accelerator: Accelerator
) -> dict[str, TrainedNetwork]:
    """The networks by name, on the device and ready to be trained; the checkpoint has them in this order."""
    optimizers = [make_optimizer([p for p in n.parameters() if p.requires_grad], config) for n in networks.values()]
    beside = [torch.compile(n, dynamic=False) if config.compile else n for n in networks.values()]
    configure_deepspeed(accelerator, config)
    wrapped = accelerator.prepare(*beside, *optimizers)
    learning, optimizers = wrapped[: len(networks)], wrapped[len(networks) :]
    # Sharding makes new parameters.
    parameters = [[p for p in n.parameters() if p.requires_grad] for n in learning]
    columns = networks.values(), beside, learning, optimizers, parameters
    return {name: TrainedNetwork(*row) for name, *row in zip(networks, *columns, strict=True)}
