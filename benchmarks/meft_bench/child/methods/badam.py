"""BAdam: block coordinate descent with Adam (Luo et al., NeurIPS 2024), by badam.

One block trains for `INTERVAL` steps, then the next, in a random order of all. The
block that trains has AdamW's state and a copy in FP32, which are dropped when the next
one begins. The new head always trains; what is outside the blocks is frozen, as is the
default of the package.
"""

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from meft.backbone.find import find_blocks
from meft.backbone.heads import freeze_all_but_head, new_heads
from meft_bench.child.backbones import blocks_of
from meft_bench.shared import optional, protocol
from meft_bench.shared.cell import Cell

INTERVAL = 50
"""Number of steps for which a block trains, K in the paper."""


def badam(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train one block at a time, and the new head."""
    freeze_all_but_head(model)
    for block in blocks_of(model):
        block.requires_grad_(True)
    return model


def badam_optimizer(
    model: PreTrainedModel, groups: list[dict[str, Any]], cell: Cell
) -> torch.optim.Optimizer:
    """Return the optimizer of blocks around AdamW.

    Raises:
        MissingError: badam is not installed.
    """
    library = optional.library("badam", "badam", "method 'badam'")
    with warnings.catch_warnings():
        # Parameters are in FP32 by the protocol, and computed with under autocast.
        warnings.filterwarnings("ignore", "BAdam expect model")
        made: Any = library.BlockOptimizer(
            base_optimizer=torch.optim.AdamW(groups, **protocol.adam_arguments()),
            named_parameters_list=[
                pair for pair in model.named_parameters() if pair[1].requires_grad
            ],
            block_prefix_list=[
                [f"{found.name}.{index}."]
                for found in find_blocks(model)
                for index in range(len(found.listed))
            ],
            active_modules=[f"{name}." for name in new_heads(model)],
            switch_block_every=INTERVAL,
            switch_mode="random",
            verbose=0,
        )
    made.register_step_post_hook(_show_state)
    optimizer: torch.optim.Optimizer = made
    return optimizer


def _show_state(optimizer: Any, *_: Any) -> None:
    """Put state and copies of weights where meters of memory look for state."""
    optimizer.state = optimizer.base_optimizer.state
    for copy in optimizer.param_idx2hp.values():
        if copy in optimizer.state:
            optimizer.state[copy]["weight"] = copy
