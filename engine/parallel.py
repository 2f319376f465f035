"""Work shared by any number of processes with the same bits as one: batches are cut by index, never by rank."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.progress import progress


def map_batches(
    fn: Callable[[list[int]], Tensor], num_items: int, batch_size: int, accelerator: Accelerator, desc: str
) -> Tensor:
    """`fn(indices) -> [len(indices), ...]` over all items, in index order, on every rank (CPU tensor).

    Batch k = items [k·batch_size, (k+1)·batch_size) goes whole to rank k mod world size, so what an item is computed
    with does not depend on how many processes there are.
    """
    batches = list(torch.arange(num_items).split(batch_size))
    mine = list(enumerate(batches))[accelerator.process_index :: accelerator.num_processes]
    bar = progress(total=num_items, desc=desc, disable=not accelerator.is_main_process)
    done = []
    for k, batch in mine:
        done.append((k, fn(batch.tolist()).cpu()))
        bar.update(min(len(batch) * accelerator.num_processes, bar.total - bar.n))
    bar.close()
    return torch.cat([values for _, values in sorted(gather_object(done), key=lambda pair: pair[0])])
