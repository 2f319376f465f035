"""How much memory a network takes beside its weights while it runs: the most that lives at once.

Counted on fake CPU tensors, from configurations alone: the meta device would take the attention that keeps its matrix.
Not counted is what a kernel needs inside, and what an allocator takes and does not use. Autocast is the CPU's, which
leaves some normalizations in half precision, where a GPU's makes them float32.
"""

import json
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from slimstep.engine.quiet import quiet
from slimstep.models.decoding import decoded_images
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.family import denoiser_of


@dataclass(frozen=True)
class Needed:
    """Bytes that a forward needs at its most, and a forward with its backward; neither gradients of weights nor the
    copies of weights that autocast makes are counted."""

    forward: int
    step: int


def training_need(
    network: ModelMixin, tokens: int = NUM_TOKENS, checkpointing: bool = False, is_half: bool = False, **fields: Any
) -> Needed:
    """Of one sample, in float32 or by autocast. fields: those of the configuration that are other than the network's,
    as sample_frames."""
    return of_training(type(network), as_json(network, **fields), tokens, checkpointing, is_half)


def evaluation_bytes(network: ModelMixin, tokens: int = NUM_TOKENS) -> int:
    """In float32, of one evaluation of one sample without gradients."""
    return of_evaluation(type(network), as_json(network), tokens)


def decoding_bytes(
    codec: ModelMixin, shape: tuple[int, ...], is_tiled: bool = False, frames_at_once: int | None = None
) -> int:
    """In float32, of an autoencoder that decodes latents [C, (F,) H, W] of one image or video."""
    return of_decoding(type(codec), as_json(codec), shape, is_tiled, frames_at_once)


def as_json(network: ModelMixin, **fields: Any) -> str:
    return json.dumps({**network.config, **fields}, default=str)


@cache  # a plan asks again
def of_training(kind: type[ModelMixin], config: str, tokens: int, checkpointing: bool, is_half: bool) -> Needed:
    with FakeTensorMode():
        network, inputs = fake(kind, config, tokens)
        network.train()
        if checkpointing:  # fake tensors have no random state that a recomputation could begin with
            network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(forget_gradient)
        with Living(network.parameters()) as living:
            # Without the cache of copies, which would count them while the forward goes on, too.
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half, cache_enabled=False):
                loss = denoiser_of(network)(network, *inputs).float().square().mean()
            forward = living.peak
            loss.backward()
    # Without checkpointing the backward needs the copies, and each is made once.
    copies = 2 * network.num_parameters() if is_half and not checkpointing else 0
    return Needed(forward - copies, living.peak - copies)


@cache
def of_evaluation(kind: type[ModelMixin], config: str, tokens: int) -> int:
    with FakeTensorMode(), torch.no_grad():
        network, inputs = fake(kind, config, tokens)
        with Living(network.parameters()) as living:
            denoiser_of(network)(network, *inputs)
    return living.peak


@cache
def of_decoding(
    kind: type[ModelMixin], config: str, shape: tuple[int, ...], is_tiled: bool, at_once: int | None
) -> int:
    with FakeTensorMode(), torch.no_grad():
        codec, latents = made(kind, config), torch.zeros(1, *shape)
        if is_tiled:
            codec.enable_tiling()
        with Living(codec.parameters()) as living:
            decoded_images(codec, latents, at_once)
    return living.peak


def fake(kind: type[ModelMixin], config: str, tokens: int) -> tuple[ModelMixin, tuple[Any, ...]]:
    """A network of this configuration without memory, and an example of what it is called with."""
    network = made(kind, config)
    return network, denoiser_of(network).example(network, 1, tokens=tokens)


def made(kind: type[ModelMixin], config: str) -> Any:
    fields = json.loads(config)
    with quiet(), no_init_weights():
        network = kind.from_config(fields)
    network.register_to_config(**fields)  # what it draws, too, of which some constructors know nothing
    return network


def forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class Living(TorchDispatchMode):
    """The bytes of all tensors that were made while it is entered and still live, `now`, and at their most, `peak`."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.bytes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return made

    def see(self, storage: torch.UntypedStorage) -> None:
        if (address := storage._cdata) not in self.bytes:
            self.bytes[address] = storage.nbytes()
            self.now += self.bytes[address]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, address)

    def forget(self, address: int) -> None:
        self.now -= self.bytes.pop(address)
