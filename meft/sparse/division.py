"""Which process has which rows, and how processes exchange them.

    owner of row i = i mod R          its place among the rows of the owner = i div R

for R processes. Rows of one expert are neighbours, so neighbours have different owners:
an expert that most tokens choose is work for all processes alike.

Every exchange begins with a header, by which each process learns how many numbers it
gets from every other, and whether the others are in the same call. All processes
therefore make the same calls in the same order. What is received is in the order of
processes, so that sums do not depend on timing.
"""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from meft.errors import UnsupportedCallError
from meft.sparse.shapes import Ids

CALLS = (
    "the shapes of rows",
    "the rows of block {} in a forward pass",
    "the rows of block {} in a backward pass",
    "the gradient of block {}",
    "a norm, sum or check of the gradient of block {}",
    "all rows of block {}",
    "the optimizer state of block {}",
)
"""What processes exchange."""
SHAPES, FORWARD, BACKWARD, GRADIENT, NUMBER, ROWS, STATE = range(len(CALLS))
EQUALLY = (
    "Every process has to run as many forward and backward passes as the others, also "
    "in evaluation and with an empty batch, with a loss that reaches the same blocks, "
    "and to read norms of gradients where the others do"
)


class Division:
    """The processes among which the rows of one block are divided.

    Args:
        group: a process group of all of them, which exchanges tensors of the host.
        block: index of the block, for messages.
        num_rows: number of rows of all processes.
        timeout: how long the group waits for a process, for messages.
    """

    def __init__(
        self, group: Any, block: int, num_rows: int, timeout: timedelta
    ) -> None:
        self.group = group
        self.block = block
        self.num_rows = num_rows
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self._timeout = timeout

    def __deepcopy__(self, memo: Any) -> Any:
        """Refuse the copy, as a copy would exchange rows without the others' knowledge.

        Raises:
            UnsupportedCallError: always.
        """
        raise UnsupportedCallError(
            "rows that are divided among processes cannot be copied or pickled: copy "
            "the model before `meft.divide_rows()`, or save it inside of "
            "`with meft.gathered_rows(model):`"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, for the same reason."""
        return self.__deepcopy__({})

    def share(self, rows: Tensor, rank: int | None = None) -> Tensor:
        """Return a view of the rows of a process, of those of all.

        Args:
            rows: one entry per row, `rows *shape`.
            rank: which process; None for this one.
        """
        return rows[(self.rank if rank is None else rank) :: self.size]

    def of_each(self, ids: Ids) -> list[Tensor]:
        """Return which elements of `ids` are rows of each process, by their place."""
        owner = ids % self.size
        return [(owner == rank).nonzero()[:, 0] for rank in range(self.size)]

    def announce(self, call: int, counts: list[int]) -> list[int]:
        """Exchange headers.

        Args:
            call: which exchange begins, an index of `CALLS`.
            counts: how many rows this process has for each.

        Returns:
            How many rows each process has for this one.

        Raises:
            UnsupportedCallError: the processes are not in the same call.
        """
        header = torch.tensor([[call, self.block, count] for count in counts])
        found = self.exchange(header, [1] * self.size, [1] * self.size, call).tolist()
        if any(each[:2] != [call, self.block] for each in found):
            where = ", ".join(
                f"process {rank} is at {CALLS[other].format(block)}"
                for rank, (other, block, _) in enumerate(found)
            )
            raise UnsupportedCallError(
                "processes among which rows are divided have to exchange the same at "
                f"the same time, but {where}. {EQUALLY}"
            )
        return [count for _, _, count in found]

    def exchange(
        self, outgoing: Tensor, to_each: list[int], from_each: list[int], call: int
    ) -> Tensor:
        """Send rows of a tensor to each process, and return what each has sent.

        Args:
            outgoing: what is sent, in the order of processes, `some *shape`.
            to_each: number of rows for each process.
            from_each: number of rows from each process.
            call: what is exchanged, an index of `CALLS`.

        Returns:
            What was received, in the order of processes.

        Raises:
            UnsupportedCallError: another process does not take part.
        """
        received = outgoing.new_empty(sum(from_each), *outgoing.shape[1:])
        try:
            distributed.all_to_all_single(
                received, outgoing.contiguous(), from_each, to_each, self.group
            )
        except RuntimeError as error:
            raise UnsupportedCallError(
                f"process {self.rank} of {self.size} has waited for the others to "
                f"exchange {CALLS[call].format(self.block)}, but one has ended or does "
                f"not answer within {self._timeout}. {EQUALLY}"
            ) from error
        return received

    def gather(self, number: Tensor, call: int = NUMBER) -> Tensor:
        """Return the numbers of all processes, `processes *shape`, on their device."""
        self.announce(call, [1] * self.size)
        ones = [1] * self.size
        copies = number.detach().cpu()[None].repeat(self.size, *[1] * number.ndim)
        return self.exchange(copies, ones, ones, call).to(number.device)

    def gather_rows(self, own: Tensor, call: int = ROWS) -> Tensor | None:
        """Return one entry per row in the first process, and None in all others.

        Args:
            own: the entries of this process's rows, `some *shape`.
            call: what is exchanged, an index of `CALLS`.
        """
        to_each = [len(own)] + [0] * (self.size - 1)
        from_each = self.announce(call, to_each)
        received = self.exchange(own, to_each, from_each, call)
        if self.rank:
            return None
        whole = received.new_empty(self.num_rows, *own.shape[1:])
        for rank, part in enumerate(received.split(from_each)):
            self.share(whole, rank).copy_(part)
        return whole
