"""Moving averages of the weights, whole or in shards, as a checkpoint keeps them."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class DeviceEMA(EMAModel):
    """EMAModel whose averages lie where and as the parameters lie; its state holds whole tensors, on the CPU.

    A step is one interpolation in place: EMAModel's own holds all differences at once, another copy of the network.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_([local(a) for a in self.shadow_params], [local(p) for p in parameters],
                             1 - self.cur_decay_value)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All ranks have to ask together: shards are gathered."""
        return {**super().state_dict(), "shadow_params": [whole(average) for average in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        places = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [as_before(a, place) for a, place in zip(self.shadow_params, places, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from its shards, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def as_before(tensor: Tensor, place: Tensor) -> Tensor:
    """`tensor` on the device of `place`, and cut into shards as that is."""
    tensor = tensor.to(place.device)
    if isinstance(place, DTensor):
        return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
    return tensor
