"""Index tensors of rows: indices of all or some rows, and the last step of each row."""

import torch
from jaxtyping import Bool
from torch import Tensor

from meft.replaceable import Replaceable
from meft.sparse.shapes import Ids, Steps


@Replaceable
def ids_of(flags: Bool[Tensor, " rows"]) -> Ids:
    """Return the indices of the True elements, ascending, on the same device."""
    return flags.nonzero()[:, 0]


@Replaceable
def keeps_all_entries(device: torch.device) -> bool:
    """Return whether entries that do not count are kept, with the weight 0.

    To leave them out, the host has to know how many there are.
    """
    return device.type == "cuda"


@Replaceable
def all_ids(num_rows: int, device: torch.device) -> Ids:
    """Return the indices of all rows, on `device`."""
    return torch.arange(num_rows, device=device)


@Replaceable
def new_steps(num_rows: int, device: torch.device) -> Steps:
    """Return step 0 for each row, on `device`."""
    return torch.zeros(num_rows, dtype=torch.long, device=device)
