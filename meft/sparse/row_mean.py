"""The mean over processes of a gradient of rows, of which each process has some.

    union = rows that have a gradient in any of R processes
    mean  = 1/R * sum over processes of the gradient of `union`, 0 for rows without one

The host exchanges one byte for each row of the table, and the numbers of the union.
Each process adds up one part of the union, in the order of processes, and
sends it to all: then all get the same bits, and so do processes among which the rows
are divided (`meft.sparse.divided_rows`).
"""

from typing import Any

import torch
from torch import Tensor, distributed

from meft.sparse.indices import ids_of
from meft.sparse.rows import Holder


def average(holder: Holder, table: Tensor, group: Any) -> None:
    """Replace the gradient of a holder by its mean over processes.

    Args:
        holder: the gradient of this process; its rows are those of other processes too
            afterwards.
        table: the rows, `rows width`, on their device.
        group: a process group that exchanges tensors of the host, all of whose
            processes call this.
    """
    num_rows, width = table.shape
    ids = [each.cpu() for each in holder.held_ids()]
    flags = torch.zeros(num_rows, dtype=torch.uint8)
    for each in ids:
        flags[each] = 1
    distributed.all_reduce(flags, distributed.ReduceOp.MAX, group)
    union = ids_of(flags.bool())
    if not len(union):
        return
    places = torch.zeros(num_rows, dtype=torch.long)
    places[union] = torch.arange(len(union))
    size = distributed.get_world_size(group)
    per_process = -(-len(union) // size)
    mine = torch.zeros(size * per_process, width)
    for each, part in zip(ids, holder.parts(), strict=True):
        mine.index_add_(0, places[each], holder.bring(part, mine.device))
    of_all = torch.empty_like(mine)
    distributed.all_to_all_single(of_all, mine, group=group)
    first, *rest = of_all.split(per_process)
    for part in rest:
        first += part
    first /= size
    distributed.all_gather(list(mine.split(per_process)), first, group)
    mean = mine[: len(union)]
    holder.replace_gradient(union.to(table.device), mean.to(table.device))
