"""Experts that a fixed hash of the token chooses (Roller et al., NeurIPS 2021).

    expert j of a token = one of the j-th part of all experts, by hash(token, block, j)

with as many parts as a token has experts, so that a token has different ones, and the
same in every step. What the token means, and what stands before it, does not matter:
the function is another one than that of a router.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from meft.sparse.adapter import SparseAdapter, sparse_adapters

_FACTOR = -7046029254386353131
"""The odd number of Fibonacci hashing: 2^64 over the golden ratio, as a signed one."""
_BLOCK = 2**40 + 1
"""What tells blocks apart: more than any token."""


@dataclass
class _Batch:
    """The tokens of the current batch, for all blocks of a model."""

    token_ids: Tensor | None = None


class HashedAdapter(SparseAdapter):
    """A sparse adapter whose experts are chosen by the identifiers of tokens."""

    batch: _Batch
    block: int
    """Number of the block, from 0, so that blocks choose differently."""

    def _experts_of(self, tokens: Tensor, early: object) -> tuple[Tensor, None]:
        ids = self.batch.token_ids
        if ids is None:
            raise ValueError(
                "experts are chosen by a hash of `input_ids`, and the model was called "
                "without: give it tokens, or take method 'sparse-experts-frozen'"
            )
        padding, flat = self.shared.batch.padding, ids.flatten()
        if padding is not None:
            flat = flat[padding.places(ids[..., None])]
        assert len(flat) == len(tokens), (len(flat), len(tokens))
        config = self.config
        return experts_of(flat, self.block, config.experts, config.top_k_experts), None


def experts_of(
    token_ids: Int[Tensor, " tokens"], block: int, num_experts: int, top_k: int
) -> Int[Tensor, "tokens kept"]:
    """Return the experts of each token, ascending.

    Args:
        token_ids: the tokens.
        block: number of the block.
        num_experts: number of experts.
        top_k: number of experts of a token, at most `num_experts`.
    """
    part = torch.arange(top_k, device=token_ids.device)
    begins = part * num_experts // top_k
    sizes = (part + 1) * num_experts // top_k - begins
    mixed = token_ids[:, None].long() * top_k + part + (block + 1) * _BLOCK
    for _ in range(2):
        mixed = mixed * _FACTOR  # int64 wraps around
        mixed = mixed ^ (mixed >> 32)
    return begins + (mixed & (2**30 - 1)) % sizes


def replace_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Let hashes take the place of the routers of a model with sparse adapters.

    Args:
        model: the model; changed in place.

    Raises:
        ValueError: its blocks do not all see the tokens of one text.
    """
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ValueError(
            f"experts are chosen by a hash of `input_ids`, and not all blocks of "
            f"{type(model).__name__} see these tokens: take method "
            "'sparse-experts-frozen'"
        )
    batch = _Batch()

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch.token_ids = args[0] if args else kwargs.get("input_ids")

    model.register_forward_pre_hook(note, with_kwargs=True)
    for block, adapter in enumerate(sparse_adapters(model).values()):
        adapter.__class__ = HashedAdapter
        assert isinstance(adapter, HashedAdapter)
        adapter.batch, adapter.block = batch, block
        adapter.router = None
    return model
