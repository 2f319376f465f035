"""Work shared by any number of processes with the same bits as one: batches are cut by index, never by rank."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from slimstep.engine.files import write_tensors
from slimstep.engine.progress import progress
from slimstep.engine.run import sleeping_ranks


def map_batches(
    fn: Callable[[list[int]], Tensor],
    num_items: int,
    batch_size: int,
    accelerator: Accelerator,
    desc: str,
    keep: Path | None = None,
) -> Tensor:
    """`fn(indices) -> [len(indices), ...]` over all items, in index order, on every rank (CPU tensor).

    Batch k = items [k·batch_size, (k+1)·batch_size) goes whole to rank k mod world size, so what an item is computed
    with does not depend on how many processes there are. Under `keep` every finished batch lies as a file until all
    are there: killed work goes on where it stopped, with any number of processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = list(torch.arange(num_items).split(batch_size))
    bar = progress(total=num_items, desc=desc, disable=not accelerator.is_main_process)
    done = []
    for k in range(rank, len(batches), world):
        file = keep / f"{k:06d}.safetensors" if keep else None
        if file and file.exists():
            done.append(load_file(file)["values"])
        else:
            done.append(fn(batches[k].tolist()).cpu())
            if file:
                write_tensors(file, {"values": done[-1]})
        bar.update(min(len(batches[k]) * world, bar.total - bar.n))
    bar.close()
    values = gathered(done, batches, world) if world > 1 else torch.cat(done)
    if keep and accelerator.is_main_process:
        shutil.rmtree(keep, ignore_errors=True)
    return values


def free_memory() -> None:
    """What nobody holds any more is free on the device, for the next stage or row, or another process."""
    gc.collect()  # a compiled network is in a cycle
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gathered(mine: list[Tensor], batches: list[Tensor], world: int) -> Tensor:
    """The values of all batches, of which the k-th lies with rank k mod world. `mine` is used up.

    Over gloo, for NCCL would take the GPUs' memory, and a batch of every rank at a time: all at once is many copies.
    """
    values: Tensor | None = None
    mine = mine[::-1]
    for first in range(0, len(batches), world):
        of_ranks: list[Tensor | None] = [None] * world
        torch.distributed.all_gather_object(of_ranks, mine.pop() if mine else None, group=sleeping_ranks())
        for indices, part in zip(batches[first : first + world], of_ranks, strict=False):
            assert part is not None, "a rank gave no values for its batch"
            if values is None:
                values = part.new_empty(sum(map(len, batches)), *part.shape[1:])
            values[indices] = part
    assert values is not None, "there are no batches"
    return values
