"""Bottleneck adapters under ordinary autograd, the plain rival of MEFT3.

The same adapters at the same places as MEFT3 has them, in an ordinary stack:

    attention    u = dropout(W_o attend(x)),     a = LN(x + u + adapter(u))
    feed-forward v = dropout(W_2 act(W_1 a)),  out = LN(a + v + adapter(a))

so a difference between the two is due to the reversible stack alone.
"""

from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

from meft.bottleneck import Bottleneck
from meft_bench.backbones import blocks_of
from meft_bench.cell import Cell


def adapters(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """Two adapters per block train, and the new classifier."""
    config = model.config
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for block in blocks_of(model):
        attention, feed_forward = (
            Bottleneck(
                config.hidden_size,
                cell.bottleneck_size,
                block.intermediate.intermediate_act_fn,
                config.hidden_dropout_prob,
            )
            for _ in range(2)
        )
        block.attention.register_module(
            "output", AdaptedAttentionOutput(block.attention.output, attention)
        )
        block.register_module("output", AdaptedOutput(block.output, feed_forward))
    return model


class AdaptedAttentionOutput(nn.Module):
    """`BertSelfOutput` with a sequential adapter that has a skip of its own."""

    def __init__(self, output: BertSelfOutput, adapter: Bottleneck) -> None:
        super().__init__()
        self.output = output
        self.adapter = adapter

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        """LN(x + u + adapter(u)), both `batch seq hidden`."""
        update = self.output.dropout(self.output.dense(attended))
        update = update + self.adapter(update)
        normed: Tensor = self.output.LayerNorm(update + x)
        return normed


class AdaptedOutput(nn.Module):
    """`BertOutput` with an adapter parallel to the two feed-forward projections."""

    def __init__(self, output: BertOutput, adapter: Bottleneck) -> None:
        super().__init__()
        self.output = output
        self.adapter = adapter

    def forward(self, inner: Tensor, a: Tensor) -> Tensor:
        """LN(a + v + adapter(a)) of `inner`, `batch seq intermediate`, and `a`."""
        update = self.output.dropout(self.output.dense(inner))
        normed: Tensor = self.output.LayerNorm(update + self.adapter(a) + a)
        return normed
