"""GaLore: gradients in a low-rank subspace (Zhao et al., ICML 2024), by galore_torch.

    w <- w - lr s P adam(P^T G)

P holds the first r singular vectors of the gradient G of a matrix, on its shorter side,
and is computed anew after every `INTERVAL` steps. AdamW's moments have the size of
P^T G. All parameters train; matrices of the blocks are projected, as in the paper.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from meft_bench.child.backbones import blocks_of
from meft_bench.child.methods.full import full
from meft_bench.shared import optional, protocol
from meft_bench.shared.cell import Cell

INTERVAL = 200
"""Number of steps with one projection, T in the paper."""
SCALE = 0.25
"""s, alpha in the paper."""


def galore(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train all parameters, those of matrices in a subspace of rank `lora_rank`."""
    return full(model, cell)


def galore_optimizer(
    model: PreTrainedModel, groups: list[dict[str, Any]], cell: Cell
) -> torch.optim.Optimizer:
    """Return GaLore's AdamW.

    Raises:
        MissingError: galore_torch, or bitsandbytes, which it imports, is missing.
    """
    library = optional.library("galore_torch", "galore-torch", "method 'galore'")
    inside = {id(p) for b in blocks_of(model) for p in b.parameters() if p.ndim == 2}
    projected = {
        "rank": cell.lora_rank,
        "update_proj_gap": INTERVAL,
        "scale": SCALE,
        "proj_type": "std",
    }
    parts = []
    for group in groups:
        for is_inside, fields in ((True, projected), (False, {})):
            chosen = [p for p in group["params"] if (id(p) in inside) == is_inside]
            if chosen:
                parts.append({**group, **fields, "params": chosen})
    made: torch.optim.Optimizer = library.GaLoreAdamW(
        parts, **protocol.adam_arguments(), no_deprecation_warning=True
    )
    made.register_step_post_hook(_show_projections)
    return made


def _show_projections(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Put projections where meters of memory look for state."""
    for state in optimizer.state.values():
        if "projector" in state:
            state["projection"] = state["projector"].ortho_matrix
