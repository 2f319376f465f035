"""The exponential moving average (EMA) of the weights, whole or in shards, as a checkpoint keeps it."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class DeviceEMA(EMAModel):
    """EMAModel whose weights lie where and as the parameters lie; its state holds whole tensors, on the CPU.

    A step is one interpolation in place: EMAModel's own holds all differences at once, another copy of the network.
    """

    shadow_params: list[Tensor]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_([local(s) for s in self.shadow_params], [local(p) for p in parameters],
                             1 - self.cur_decay_value)  # fmt: skip

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """All ranks have to ask together: shards are gathered, tensor by tensor.

        A rank that does not `keep` them has no tensor, so that one copy of the network lies in a machine's memory.
        """
        gathered = (whole(weight, keep) for weight in self.shadow_params)
        return {**super().state_dict(), "shadow_params": [weight for weight in gathered if weight is not None]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the EMA weights in place, tensor by tensor; they may lie in a file that is mapped into memory."""
        saved, places = state_dict["shadow_params"], self.shadow_params
        super().load_state_dict({**state_dict, "shadow_params": []})  # which would copy all of them
        self.shadow_params = places
        for weight, place in zip(saved, places, strict=True):
            assert weight.shape == place.shape, f"EMA weights of {tuple(weight.shape)} for {tuple(place.shape)}"
            local(place).copy_(local(as_before(weight, place)))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """The tensor, gathered from its shards, on the CPU; None for a rank that only gives its shard."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.cpu() if keep else None


def as_before(tensor: Tensor, place: Tensor) -> Tensor:
    """`tensor` on the device of `place`, and cut into shards as that is."""
    tensor = tensor.to(place.device)
    if isinstance(place, DTensor):
        return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
    return tensor
