"""LISA: layerwise importance sampled AdamW (Pan et al., NeurIPS 2024).

Of the blocks, `NUM_BLOCKS` random ones train for `INTERVAL` steps, then others. What is
outside the blocks, the embeddings, last norm and head, always trains. Frozen blocks
have neither gradients nor state: a block that is chosen again begins with new moments.
"""

import random
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from meft_bench.child.backbones import blocks_of
from meft_bench.child.methods.full import full
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell

NUM_BLOCKS = 2
"""Number of blocks that train at a time, gamma in the paper."""
INTERVAL = 20
"""Number of steps for which they do, K in the paper."""


def lisa(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train a few blocks at a time, and all that is not in a block."""
    return full(model, cell)


def lisa_optimizer(
    model: PreTrainedModel, groups: list[dict[str, Any]], cell: Cell
) -> torch.optim.Optimizer:
    """Return AdamW of the blocks that were drawn."""
    return Lisa(groups, blocks_of(model), cell.seed)


class Lisa(torch.optim.AdamW):
    """AdamW that draws at every `INTERVAL` steps the blocks that train.

    Args:
        groups: parameters with their decay.
        blocks: the blocks to draw from; others of the parameters always train.
        seed: of the draws.
    """

    def __init__(
        self, groups: list[dict[str, Any]], blocks: list[nn.Module], seed: int
    ) -> None:
        super().__init__(groups, **protocol.adam_arguments())
        self._blocks = blocks
        # Of Python, because a draw of torch has no values on a virtual GPU.
        self._random = random.Random(seed)
        self._num_steps = 0
        self._draw()

    def step(self, closure: Any = None) -> Any:
        """Take one step, after every `INTERVAL`-th of which other blocks train."""
        loss = super().step(closure)
        self._num_steps += 1
        if self._num_steps % INTERVAL == 0:
            self._draw()
        return loss

    def _draw(self) -> None:
        number = min(NUM_BLOCKS, len(self._blocks))
        drawn = self._random.sample(range(len(self._blocks)), number)
        for index, block in enumerate(self._blocks):
            for parameter in block.parameters():
                parameter.requires_grad_(index in drawn)
                if index not in drawn:
                    parameter.grad = None
                    self.state.pop(parameter, None)
                elif self._num_steps and not self.state[parameter]:
                    # As AdamW does at the next step, so that the memory between two
                    # steps is the same before and after a draw.
                    self.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
