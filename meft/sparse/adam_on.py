"""Which implementation of AdamW updates rows on a device.

On a CPU it is `meft.sparse.adam_kernel`, in one pass over memory, which needs numba;
elsewhere it is `meft.sparse.adam`, which gives the same bits.
"""

import importlib.util
import warnings
from typing import Any

import torch

from meft.replaceable import Replaceable
from meft.sparse import adam


@Replaceable
def adam_on(device: torch.device) -> Any:
    """Return the module whose `advance`, `due` and `values` update and read rows.

    Warns:
        UserWarning: numba is not installed, so that rows on a CPU take longer.
    """
    if device.type != "cpu":
        return adam
    if importlib.util.find_spec("numba") is None:
        warnings.warn(
            "numba is not installed: rows of sparse adapters take their steps many "
            "times slower. `pip install 'meft[sparse]'`",
            stacklevel=6,
        )
        return adam
    from meft.sparse import adam_kernel

    return adam_kernel
