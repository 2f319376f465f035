"""Work shared by any number of processes with the same bits as one: batches are cut by index, never by rank."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from data.files import write_tensors
from data.progress import progress
from engine.run import sleeping_ranks


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
    batches = list(torch.arange(num_items).split(batch_size))
    mine = list(enumerate(batches))[accelerator.process_index :: accelerator.num_processes]
    bar = progress(total=num_items, desc=desc, disable=not accelerator.is_main_process)
    done = []
    for k, batch in mine:
        file = keep / f"{k:06d}.safetensors" if keep else None
        done.append((k, kept(file) if file and file.exists() else computed(fn(batch.tolist()).cpu(), file)))
        bar.update(min(len(batch) * accelerator.num_processes, bar.total - bar.n))
    bar.close()
    values = torch.cat([values for _, values in sorted(gathered(done, accelerator), key=lambda pair: pair[0])])
    if keep and accelerator.is_main_process:
        shutil.rmtree(keep, ignore_errors=True)
    return values


def gathered(mine: list, accelerator: Accelerator) -> list:
    """The entries of all ranks' lists, in the order of the ranks; over gloo, for NCCL would take the GPUs' memory."""
    if accelerator.num_processes == 1:
        return mine
    lists = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(lists, mine, group=sleeping_ranks())
    return [entry for of_rank in lists for entry in of_rank]


def kept(file: Path) -> Tensor:
    return load_file(file)["values"]


def computed(values: Tensor, file: Path | None) -> Tensor:
    """The values, written to `file` if there is one."""
    if file:
        write_tensors(file, {"values": values})
    return values
