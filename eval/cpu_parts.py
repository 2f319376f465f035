"""Drawing on a CPU: a batch is cut into parts of a few images, which the cores share, a thread for each.

A part stays in its core's cache, and Python's share of every operation runs on all cores; one batch on all threads has
neither. Parts are cut by index and a part runs as a whole, so an image does not depend on how many threads there are.
A block that is closed for a whole part is not computed, either: the network runs without it, which gives the same bits.

Axes: B images, N blocks (columns of a block mask).
"""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from slimstep.models.families.prunable import Prunable
from slimstep.models.families.transformer.network import PrunableTransformer

LATENT_PIXELS = 4096  # of a part: 16 images of 16×16, one of 64×64

Draw = Callable[[nn.Module, list[int], Tensor | None], Tensor]


class Stopped(Exception):
    """The main thread was interrupted; what the other threads would still draw is not wanted."""


def can_be_parted(unet: nn.Module) -> bool:
    """Whether this is a network on the CPU that is not compiled, which would make a graph for every size of a part."""
    return isinstance(unet, (UNet2DConditionModel, PrunableTransformer)) and unet.device.type == "cpu"


def draw_in_parts(draw: Draw, unet: nn.Module, rows: int, block_mask_BN: Tensor | None, pixels: int) -> Tensor:
    """`draw(network, row numbers, mask or None)` of all rows, part by part, in order.

    pixels: of one image's latents. What a part raises is raised here.
    """
    parts = torch.arange(rows).split(max(1, LATENT_PIXELS // pixels))
    threads, stop = torch.get_num_threads(), threading.Event()
    workers = min(len(parts), threads)

    def watch(*_) -> None:
        if stop.is_set():
            raise Stopped

    def task(part: Tensor) -> Tensor:
        network, mask_BN = running[tuple(part.tolist())]
        return draw(network, part.tolist(), mask_BN)

    networks: dict[tuple[bool, ...] | None, nn.Module] = {}
    running = {tuple(part.tolist()): running_network(unet, block_mask_BN, part, networks) for part in parts}
    for network, _ in running.values():
        network.register_forward_pre_hook(watch)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    try:
        return torch.cat(list(pool.map(task, parts)))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def running_network(
    unet: nn.Module, block_mask_BN: Tensor | None, part: Tensor, made: dict[tuple[bool, ...] | None, nn.Module]
) -> tuple[nn.Module, Tensor | None]:
    """The network that draws these rows, and the mask it takes. Networks of parts alike are `made` once.

    None of them is `unet` itself: a network that is given a mask keeps it while it runs, so threads cannot share it.
    """
    mask_BN = None if block_mask_BN is None else block_mask_BN[part]
    if mask_BN is not None and bool((mask_BN != mask_BN[0]).any()):
        return twin(unet), mask_BN
    key = None if mask_BN is None else tuple(mask_BN[0].tolist())
    if key not in made:
        made[key] = twin(unet)
        if key is not None:
            remove(made[key], [block for block, is_open in zip(unet.kept_blocks, key, strict=True) if not is_open])
    return made[key], None


def remove(unet: Prunable, blocks: list[str]) -> None:
    """Takes kept blocks out of a running network, layers before the transformers that hold them."""
    for block in sorted(blocks, key=lambda block: block not in unet.parents):
        for path in unet.instances(block):
            unet.remove_block(path)


def twin(network: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)
