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
def knows_sizes(device: torch.device) -> bool:
    """Return whether the host knows sizes that depend on values without waiting."""
    return device.type == "cpu"


@Replaceable
def all_ids(num_rows: int, device: torch.device) -> Ids:
    """Return the indices of all rows, on `device`."""
    return torch.arange(num_rows, device=device)


@Replaceable
def new_steps(num_rows: int, device: torch.device) -> Steps:
    """Return step 0 for each row, on `device`."""
    return torch.zeros(num_rows, dtype=torch.long, device=device)
