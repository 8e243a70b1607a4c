"""Adapters of many neurons parallel to the feed-forward (Hao et al., ACL 2024).

`dense` keeps and runs all neurons on the device, as the paper's Parallel Adapter;
`dense_offload` does the same with rows and optimizer in host memory, so that every row
is copied to the device and every gradient to the host once per step. `sparse` and
`sparse_experts` run and transfer the neurons that a batch activates;
`sparse_experts_...` disable or change one part of that. All train the adapter and the
new head.

frozen   the router only selects experts: it keeps its initial values, in 16 bits
random   a fixed hash of a token's identifier takes the place of the router, so that
         what a token means does not matter (Roller et al., NeurIPS 2021)
"""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import meft
from meft.backbone.find import find_blocks
from meft.backbone.heads import freeze_all_but_head
from meft.sparse.adapter import sparse_adapters
from meft.sparse.dense import DenseAdapter
from meft_bench.child.methods import hashed_experts
from meft_bench.child.methods.adapters import AdaptedBlock
from meft_bench.shared.cell import Cell


def dense(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Run and train all neurons of every block on the device."""
    freeze_all_but_head(model)
    for found in find_blocks(model):
        adapted = nn.ModuleList()
        for block in found.listed:
            shape = found.family.adapter_shape(block, found.config)
            adapter = DenseAdapter(shape.hidden_size, cell.num_neurons)
            adapted.append(AdaptedBlock(block, found.family, mlp_adapter=adapter))
        setattr(found.owner, found.attribute, adapted)
    return model


def _sparse(model: PreTrainedModel, cell: Cell, **fields: Any) -> PreTrainedModel:
    config = {
        "num_neurons": cell.num_neurons,
        "top_k_neurons": cell.top_k_neurons,
        "top_k_experts": cell.top_k_experts,
        "num_experts": cell.num_experts or None,
        "device_bytes": cell.row_budget_bytes,
        # Under autocast, the dtype of the backbone is not the compute dtype.
        "transfer_dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(cell.dtype),
    }
    return meft.add_sparse_adapters(model, meft.SparseConfig(**config | fields))


def dense_offload(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Run all neurons, with their rows and optimizer in host memory."""
    return _sparse(
        model,
        cell,
        num_experts=0,
        top_k_neurons=cell.num_neurons,
        semantics="union",
        update="dense",
    )


sparse = partial(_sparse, num_experts=0)
sparse_experts = partial(_sparse)
sparse_experts_union = partial(_sparse, semantics="union")
sparse_experts_resident = partial(_sparse, placement="resident")
sparse_experts_lookahead = partial(_sparse, lookahead=1)


def sparse_experts_frozen(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Select neurons by a router that does not learn, stored in 16 bits."""
    model = _sparse(model, cell, gate="none")
    for adapter in sparse_adapters(model).values():
        assert adapter.router is not None
        adapter.router.data = adapter.router.data.bfloat16()
    return model


def sparse_experts_random(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Select neurons by a fixed hash of the token, without a router."""
    return hashed_experts.replace_routers(_sparse(model, cell, gate="none"))


def sparse_experts_divided(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Divide the rows among the ranks of the cell, of which each keeps a share."""
    model = _sparse(model, cell)
    if cell.ranks > 1:
        meft.divide_rows(model)
    return model


sparse_experts_no_cache = partial(_sparse, cache="off")
sparse_experts_window = partial(_sparse, cache="window")
sparse_experts_home = partial(_sparse, cache="home")
sparse_experts_no_prefetch = partial(_sparse, prefetch=False)
sparse_experts_wide = partial(_sparse, transfer_dtype="float32")
sparse_experts_lazy = partial(_sparse, update="lazy")
sparse_experts_dense_update = partial(_sparse, update="dense")
